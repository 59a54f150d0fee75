"""Scenarios on the CUDA twin: scripts in processes of their own, which leave JSON.

A script names its scenarios and ends in ``leave(SCENARIOS)``; a test calls ``found(script)``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from patience import HUNG

REPOSITORY = Path(__file__).parents[3]
HELPERS = REPOSITORY / "tests" / "helpers"


def found(script: Path) -> dict[str, Any]:
    """What each scenario of ``script`` returned, by its name. AssertionError with what the process
    said where one raised."""
    paths = filter(None, [str(HELPERS), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    own = {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "found.json")
        run = subprocess.run(
            [sys.executable, str(script), str(result)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=HUNG,
        )
        assert run.returncode == 0, f"{run.stdout[-4000:]}\n{run.stderr[-8000:]}"
        return json.loads(result.read_text())


def leave(scenarios: Mapping[str, Callable[[], Any]]) -> None:
    """Run ``scenarios``, those named after the file on the command line or all, and write what they
    return to that file."""
    file, *named = sys.argv[1:]
    results = {}
    for name in named or scenarios:
        began = time.process_time()
        results[name] = scenarios[name]()
        print(f"scenario {name}: {time.process_time() - began:.1f} s", flush=True)
    Path(file).write_text(json.dumps(results))
