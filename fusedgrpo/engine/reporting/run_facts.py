"""The facts of a run that its options do not say: versions, hardware, the command."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import Any

import fusedgrpo
from fusedgrpo import host
from fusedgrpo.config.redaction import hide, hide_known

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "triton")


def versions() -> dict[str, str]:
    """By package, of those that are installed."""
    found = [(name, host.package_version(name)) for name in PACKAGES]
    return {
        "fusedgrpo": fusedgrpo.__version__,
        "python": platform.python_version(),
        **{name: version for name, version in found if version},
    }


def machine() -> dict[str, Any]:
    """Memory in bytes. gpu: its name; it and its memory are None where there is none."""
    gpu = host.has_gpu()
    return {
        "platform": platform.platform(),
        "cpu": host.cpu_name(),
        "threads": host.threads(),
        "memory": host.memory(),
        "gpu": host.gpu_name() if gpu else None,
        "gpu_memory": host.gpu_memory()[1] if gpu else None,
    }


def command() -> str:
    """How this process was called, without secrets."""
    said: str = hide_known(hide(shlex.join(sys.argv)))
    return said


def run_facts() -> list[str]:
    """Lines for run.log, without secrets."""
    here = machine()
    hardware = [here["platform"], f"{here['cpu']}, {here['threads']} threads"]
    hardware.append(f"{here['memory'] / 2**30:.0f} GiB")
    if here["gpu"] is not None:
        hardware.append(f"{here['gpu']}, {here['gpu_memory'] / 2**30:.0f} GiB")
    return [
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions().items())}",
        f"Machine: {'; '.join(hardware)}",
        f"Command: {command()}",
    ]
