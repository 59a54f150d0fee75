"""The Triton kernels on the CPU: the kernel tests again, under Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedgrpo.kernels.backend import interpreted

# The folders of tests that run for every implementation, and the least that pass.
ROOMS = {"advantage": 50, "decode": 40, "fused_loss": 20, "logprob": 50, "loss": 100, "norm": 20,
         "sample": 50}  # fmt: skip
HERE = Path(__file__).parent


def test_every_room_is_run():
    assert {folder.parent.name for folder in HERE.glob("*/test_*.py")} == set(ROOMS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(interpreted(), reason="this is the interpreter's process")
@pytest.mark.parametrize("room", ROOMS)
def test_every_kernel_test_passes_under_the_interpreter(room):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / room), "-k", "triton-interpreted"],
        env={**env, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= ROOMS[room], run.stdout[-2000:]
