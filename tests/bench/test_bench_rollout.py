"""bench_rollout runs, on completions of the lengths that it says, and counts keys and values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_compares_the_samplers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "bench" / "bench_rollout.py"), "--quick"),
            *("--peers", "hf,trl,cb", "--rounds", "1", "--threads", "1", "--json", str(file)),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = {(row["impl"], row["metric"]): row["value"] for row in rows}
    impls = {"fusedgrpo", "fusedgrpo adapter", "fusedgrpo generate", "hf", "trl", "cb"}
    assert {impl for impl, _ in found} >= impls
    assert all(found[impl, "time"] > 0 for impl in impls)
    # In pages, of which these few tokens fill no more than a part.
    assert 0 < found["fusedgrpo", "bytes/kv"] < 2 * found["hf", "bytes/kv"]
    assert found["fusedgrpo", "bytes/token"] > 0
