"""The script for a GPU asks benches only for what they have; there is none here to run it on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_session.sh"


def commands() -> list[tuple[str, list[str]]]:
    """Each call of a bench: its file and its options."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    calls = re.findall(r"\$PY (bench/\w+\.py)(.*)", text)
    return [(file, re.findall(r" (--[a-z0-9-]+)", rest)) for file, rest in calls]


def test_it_is_a_script_that_runs() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111
    found = subprocess.run([str(SCRIPT), "no-such-part", "/tmp"], capture_output=True, text=True)
    assert found.returncode == 2 and "tests, smoke, kernels" in found.stderr


def test_its_parts_are_those_of_the_page() -> None:
    parts = re.findall(r"^([a-z]+)\)$", SCRIPT.read_text(), re.M)
    page = (ROOT / "docs" / "gpu-session.md").read_text()
    assert parts == re.findall(r"^\| `([a-z]+)` \|", page, re.M) and len(parts) >= 6


@pytest.mark.parametrize("file", sorted({file for file, _ in commands()}))
def test_a_bench_has_the_options_that_it_is_called_with(file: str) -> None:
    source = (ROOT / file).read_text()
    if "harness.parser(" in source:
        source += (ROOT / "bench" / "harness.py").read_text()
    for called, options in commands():
        if called == file:
            assert all(f'"{option}"' in source for option in options), options
