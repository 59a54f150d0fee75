"""The part that benches share, and ``bench_step.py`` as a user runs it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from patience import HUNG

from fusedgrpo import host

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_harness", BENCH / "harness.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(BENCH)}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=HUNG,
    )


def test_contenders_take_turns_and_the_warm_up_does_not_count(harness: ModuleType) -> None:
    order: list[str] = []

    def step(name: str) -> dict[str, float]:
        order.append(name)
        return {"time": len(order)}

    samples = harness.interleave(
        {"a": lambda: step("a"), "b": lambda: step("b")}, rounds=2, warmup=1
    )
    assert order == ["a", "b"] * 3
    assert samples == {"a": {"time": [3, 5]}, "b": {"time": [4, 6]}}


def test_ratios_are_of_medians_and_against_ours(harness: ModuleType) -> None:
    samples = {"fusedgrpo": {"time": [1.0, 2.0, 9.0]}, "peer": {"time": [6.0, 5.0, 1.0]}}
    figures = {(impl, metric): value for impl, metric, value, _ in harness.figures(samples, UNITS)}
    assert figures["fusedgrpo", "time"] == 2
    assert figures["fusedgrpo", "time/min"] == 1
    assert figures["fusedgrpo", "time/max"] == 9
    assert figures["peer", "time/ratio"] == 2.5
    assert ("fusedgrpo", "time/ratio") not in figures


def test_every_round_is_in_the_figures_in_order(harness: ModuleType) -> None:
    found = harness.figures({"peer": {"time": [6.0, 5.0, 7.0]}}, UNITS)
    assert [f[2] for f in found if f[1] == "time/round"] == [6, 5, 7]
    assert not [f for f in found if f[1] == "time/ratio"]  # nothing of ours to compare with


UNITS = {"time": "s"}


def test_a_report_is_json_lines_that_say_where_they_come_from(
    harness: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {"fusedgrpo": {"time": [1.0]}, "peer": {"time": [3.0]}}
    file = tmp_path / "results" / "x.jsonl"
    rows = harness.report("b", "c", samples, UNITS, json_file=file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert all(tuple(row) == harness.ROW_KEYS for row in rows)
    assert rows[0]["versions"]["torch"]
    shown = capsys.readouterr().out
    assert "3.00" in next(line for line in shown.splitlines() if " peer " in line)


def test_a_machine_is_described_without_its_name(harness: ModuleType) -> None:
    text = harness.machine()
    assert f"{host.cores()} cores" in text and "GiB" in text
    assert socket.gethostname() not in text


@pytest.mark.parametrize("error", [2e-4, math.nan, math.inf])
def test_the_gate_ends_the_bench_with_1(
    harness: ModuleType, error: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        harness.gate({"fusedgrpo": {"loss": 0.0}, "peer": {"loss": error}}, 1e-4)
    assert stopped.value.code == 1
    assert "peer: loss" in capsys.readouterr().err


def test_the_gate_lets_pass_what_is_within_tolerance(harness: ModuleType) -> None:
    harness.gate({"fusedgrpo": {"loss": 1e-4}}, 1e-4)


def test_a_peer_that_is_absent_is_named_and_skipped(
    harness: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.installed(["json", "no_such_peer"]) == ["json"]
    assert "no_such_peer: not installed, skipped" in capsys.readouterr().out


def test_a_peer_that_a_bench_does_not_know_is_refused(
    harness: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.parser("", ["trl"]).parse_args(["--peers", "trl"]).peers == ["trl"]
    with pytest.raises(SystemExit):
        harness.parser("", ["trl"]).parse_args(["--peers", "tlr"])
    assert "this bench knows trl" in capsys.readouterr().err


def test_timed_measures_the_work(harness: ModuleType) -> None:
    figures = harness.timed(lambda: sum(range(200_000)))()
    assert list(figures) == ["time"] and figures["time"] > 0


WORKERS = """
import os, sys, tempfile
from pathlib import Path
import harness

from fusedgrpo import host

def work(turns, megabytes):
    print("chatter of a library")
    while True:
        if turns.wait() == "die":
            print("last words", flush=True)
            os._exit(3)
        harness.PeakMemory.reset()
        before = harness.PeakMemory.bytes()
        bytearray(megabytes * 2**20)
        turns.answer(harness.PeakMemory.bytes() - before)

def fail(turns):
    raise ValueError("no such luck")

if __name__ == "__main__":
    log = Path(sys.argv[1])
    small, large = (harness.Worker(f"{n}", log / str(n), work, n) for n in (1, 300))
    growth = [worker.ask("step") / 2**20 for worker in (small, large, small, large)]
    assert max(growth[0], growth[2]) < 100 < 250 < min(growth[1], growth[3]), growth
    small.close()
    bad = harness.Worker("bad", log / "bad", fail)
    bad._process.join()
    for worker, request in ((large, "die"), (bad, "step")):
        try:
            worker.ask(request)
        except RuntimeError as error:
            print(error)
"""


def test_workers_have_their_own_peak_memory_and_their_failures_are_told(tmp_path: Path) -> None:
    script = tmp_path / "bench_workers.py"
    script.write_text(WORKERS)
    result = run(script, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "chatter" not in result.stdout.replace("last printed:\nchatter of a library", "")
    assert "300 ended without an answer" in result.stdout and "last words" in result.stdout
    assert "bad failed" in result.stdout and "ValueError: no such luck" in result.stdout


def check_step(tmp_path: Path, *arguments: str) -> dict[tuple[str, str], Any]:
    """Run ``bench_step.py --quick``; its figures by contender and metric."""
    file = tmp_path / "step.jsonl"
    result = run(
        BENCH / "bench_step.py", "--quick", "--rounds", "1", "--json", str(file), *arguments
    )
    assert result.returncode == 0, result.stderr
    assert "gate: relative error" in result.stdout
    text = file.read_text()
    assert socket.gethostname() not in text and str(Path.home()) not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["bench"] for row in rows} == {"step"}
    return {(row["impl"], row["metric"]): row["value"] for row in rows}


@pytest.mark.slow
@pytest.mark.peer
def test_bench_step_compares_equal_work_with_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    figures = check_step(tmp_path, "--peers", "trl")
    assert {impl for impl, _ in figures} == {"fusedgrpo", "trl"}
    phases = sum(figures["fusedgrpo", f"time/{name}"] for name in ("sample", "score", "update"))
    assert 0 < phases <= figures["fusedgrpo", "time/step"]
    assert figures["fusedgrpo", "tokens/sampled"] == 2 * 4 * 6
    assert figures["fusedgrpo", "flops"] > 0
    assert figures["trl", "tokens/sampled"] == figures["fusedgrpo", "tokens/sampled"]
    assert figures["trl", "time/step/ratio"] > 0
