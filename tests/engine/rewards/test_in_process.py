"""inline: where callables run."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from fusedgrpo.engine.interrupts import Interrupted, StopSignals
from fusedgrpo.engine.rewards.call import Batch, CallFailed, RewardCall
from fusedgrpo.engine.rewards.in_process import Concurrent, EventLoop, Inline

BATCH = Batch(["p"], ["c"], [[0]], {}, None, [0])


def test_sync_callables_run_in_the_calling_thread() -> None:
    def here(**kwargs: Any) -> list[bool]:
        return [threading.current_thread() is threading.main_thread()]

    scorer = Inline(RewardCall(here))
    scorer.start(BATCH)
    assert scorer.finish().values == [1.0]


def test_async_callables_meet_in_one_loop_for_the_whole_run() -> None:
    loops = set()
    arrived = []

    async def waits_for_the_other(**kwargs: Any) -> list[float]:
        loops.add(id(asyncio.get_running_loop()))
        arrived.append(None)
        while len(arrived) % 2:
            await asyncio.sleep(0.001)
        return [1.0]

    loop = EventLoop()
    scorers = [Concurrent(RewardCall(waits_for_the_other), loop) for _ in range(2)]

    async def notebook() -> None:  # has a loop running in this thread
        for _ in range(2):
            for scorer in scorers:
                scorer.start(BATCH)
            assert [scorer.finish().values for scorer in scorers] == [[1.0], [1.0]]

    asyncio.run(notebook())
    threads = threading.active_count()
    for scorer in scorers:
        scorer.close()
    assert len(loops) == 1 and threading.active_count() == threads - 1


def test_a_failing_async_callable_is_a_failed_call() -> None:
    async def broken(**kwargs: Any) -> list[float]:
        raise OSError("judge is down")

    scorer = Concurrent(RewardCall(broken), EventLoop())
    scorer.start(BATCH)
    with pytest.raises(CallFailed, match="OSError: judge is down"):
        scorer.finish()
    scorer.close()


def test_an_async_callable_has_a_deadline_too() -> None:
    async def slow(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(60 if completions == ["slow"] else 0)
        return [1.0] * len(completions)

    loop = EventLoop()
    scorer = Concurrent(RewardCall(slow), loop, timeout=0.2)
    scorer.start(replace(BATCH, completions=["slow"]))
    with pytest.raises(CallFailed, match=r"more than 0\.2 seconds") as caught:
        scorer.finish()
    assert not caught.value.repeatable
    scorer = Concurrent(RewardCall(slow), loop)  # which is free again
    scorer.start(BATCH)
    assert scorer.finish().values == [1.0]
    scorer.close()


class Odd(BaseException):
    """Not an Exception."""


@pytest.mark.parametrize(
    "error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), Odd()]
)
@pytest.mark.parametrize("kind", ["sync", "async", "in a task"])
def test_whatever_a_callable_raises_is_its_failure_alone(error: BaseException, kind: str) -> None:
    def leave(**kwargs: Any) -> list[float]:
        raise error

    async def leave_later(**kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        raise error

    async def leave_in_a_task(**kwargs: Any) -> list[float]:
        return await asyncio.get_running_loop().create_task(leave_later())

    with StopSignals() as signals:

        def call(function: Any) -> RewardCall:
            return RewardCall(function, interrupts=lambda: not signals.none_came)

        if kind == "sync":
            scorer: Any = Inline(call(leave), signals)
        else:
            function = leave_later if kind == "async" else leave_in_a_task
            scorer = Concurrent(call(function), EventLoop(), None, signals)
        for _ in range(2):  # and the loop is there for the next batch
            scorer.start(BATCH)
            with pytest.raises(CallFailed, match=type(error).__name__):
                scorer.finish()
        scorer.close()


@pytest.mark.parametrize("kind", ["sync", "async", "async that blocks"])
def test_a_signal_ends_a_callable_that_is_at_work(kind: str) -> None:
    working = threading.Event()

    def sleep(**kwargs: Any) -> list[float]:
        working.set()
        for _ in range(6000):  # a signal just before a call of sleep does not end that call
            time.sleep(0.1)
        return [1.0]

    async def sleep_later(**kwargs: Any) -> list[float]:
        if kind == "async that blocks":
            return sleep()
        working.set()
        await asyncio.sleep(600)
        return [1.0]

    def terminate() -> None:
        working.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    with StopSignals() as signals:
        scorer: Any = (
            Inline(RewardCall(sleep), signals)
            if kind == "sync"
            else Concurrent(RewardCall(sleep_later), EventLoop(), None, signals)
        )
        scorer.start(BATCH)
        threading.Thread(target=terminate).start()
        with pytest.raises(Interrupted):
            scorer.finish()
        scorer.close()


def test_a_callable_that_swallows_the_signal_is_the_last() -> None:
    def swallow(**kwargs: Any) -> list[float]:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:  # noqa: BLE001  what is tested
            return [1.0]
        raise AssertionError

    with StopSignals() as signals:
        scorer = Inline(RewardCall(swallow), signals)
        scorer.start(BATCH)
        assert scorer.finish().values == [1.0]
        with pytest.raises(Interrupted):
            scorer.finish()
