"""Signals end a run in order, in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from patience import HUNG

from fusedgrpo.engine.interrupts import Interrupted, StopSignals

LOOP = """
import os, select, signal, sys, time
from fusedgrpo.engine.interrupts import StopSignals
ignored = [getattr(signal, name) for name in sys.argv[1:]]
for number in ignored:
    signal.signal(number, signal.SIG_IGN)
stop = StopSignals()
with stop:
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.1)[0]:  # until stdin is closed
        try:
            stop.check()
        except SystemExit:
            print("saved", flush=True)
            if "HANG" in os.environ:
                time.sleep(10_000)
            raise
print("done", flush=True)
"""


def start(*ignored: str, **env: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *ignored],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_the_run_after_saving_with_its_exit_code(
    number: signal.Signals, code: int
) -> None:
    process = start()
    process.send_signal(number)
    process.wait(HUNG)
    out, err = process.communicate()
    assert (out, process.returncode) == ("saved\n", code), err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_second_signal_kills(number: signal.Signals, code: int) -> None:
    process = start(HANG="1")
    process.send_signal(number)
    assert process.stdout is not None and process.stdout.readline() == "saved\n"
    process.send_signal(number)
    process.wait(HUNG)
    process.communicate()
    assert process.returncode == code


def test_what_nohup_ignores_stays_ignored() -> None:
    process = start("SIGHUP")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=HUNG)  # closes its stdin
    assert (out, process.returncode) == ("done\n", 0), err


def test_handlers_come_back_and_a_second_run_starts_without_the_old_signal() -> None:
    before = [signal.getsignal(number) for number in StopSignals.SIGNALS]
    stop = StopSignals()
    with stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted) as raised:
            stop.check()
        assert raised.value.code == 143 and raised.value.signal_name == "SIGTERM"
    assert [signal.getsignal(number) for number in StopSignals.SIGNALS] == before
    with stop:
        stop.check()


def test_outside_the_main_thread_it_does_nothing() -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with StopSignals() as stop:
                stop.check()
        except BaseException as error:  # noqa: BLE001  (handed to the test's thread)
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors


def test_inside_held_nothing_is_raised_and_the_second_signal_comes_after() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        with stop.at_once(), stop.held():
            signal.raise_signal(signal.SIGINT)
            with stop.held():
                signal.raise_signal(signal.SIGINT)
            done.append(True)
        done.append(False)
    assert done == [True]


def test_inside_at_once_a_signal_is_raised_where_it_comes() -> None:
    with StopSignals() as stop:
        with pytest.raises(Interrupted), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), stop.at_once():  # nobody had looked at it since
            raise AssertionError


def test_a_second_signal_goes_through_all_who_catch_it() -> None:
    reached = []
    before = signal.signal(signal.SIGTERM, lambda *what: reached.append("the program's own"))
    try:
        with StopSignals() as outer, outer.at_once(), StopSignals() as inner:
            signal.raise_signal(signal.SIGTERM)
            assert not reached
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Interrupted):
                inner.check()
            outer.check()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == ["the program's own"]


LOADS = """
import sys, time
from fusedgrpo import cli

@cli.app.command()
def load() -> None:
    print("loading", flush=True)
    for _ in range(6000):  # a signal just before a call of sleep does not end that call
        time.sleep(0.1)

sys.argv = ["fusedgrpo", "load"]
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line_ends_in_order_while_it_loads(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOADS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert err == f"fusedgrpo: stopped by {number.name}; nothing was begun.\n"
