"""bench_learning runs, and finds when a curve reaches its target."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_learning", BENCH / "bench_learning.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_learning", module)
    spec.loader.exec_module(module)
    return module


def test_when_a_target_is_reached(bench: Any) -> None:
    curve = [(0, 0.0, 0.2), (5, 10.0, 0.4), (10, 20.0, 0.3), (15, 30.0, 0.8)]
    assert bench.reached(curve, 0.1) == 0.0
    assert bench.reached(curve, 0.3) == pytest.approx(5.0)
    assert bench.reached(curve, 0.55) == pytest.approx(25.0)
    assert math.isnan(bench.reached(curve, 0.9))


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, str(BENCH / "bench_learning.py"), "--quick", "--tasks", "gcd"),
            *("--kinds", "off,both", "--seeds", "1", "--threads", "1", "--json", str(file)),
        ],
        env={**os.environ, "PYTHONPATH": str(BENCH.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    curves = {row["impl"]: row["value"] for row in rows if row["metric"] == "curve"}
    assert set(curves) == {"off", "both"}
    assert [look[0] for look in curves["both"]] == [0, 1, 2]
    times = {r["impl"]: r["value"] for r in rows if r["metric"] == "processor_time"}
    assert times["off"] > 0 and times["both"] == pytest.approx(curves["both"][-1][1])
