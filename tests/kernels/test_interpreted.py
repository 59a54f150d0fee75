"""The Triton kernels on the CPU: the kernel tests again, under Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusedgrpo.kernels.backend import interpreted


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(interpreted(), reason="this is the interpreter's process")
def test_every_kernel_test_passes_under_the_interpreter():
    here = Path(__file__).parent
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(here), "-k", "triton-interpreted"],
        env={**env, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) > 100, run.stdout[-2000:]
