"""The facts of a run that its options do not say: versions, hardware, the command."""

from __future__ import annotations

import platform
import shlex
import sys

import fusedgrpo
from fusedgrpo import host
from fusedgrpo.config.redaction import hide, hide_known

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "triton")


def run_facts() -> list[str]:
    """Lines for run.log, without secrets."""
    versions = [(name, host.package_version(name)) for name in PACKAGES]
    known = [f"fusedgrpo {fusedgrpo.__version__}", f"python {platform.python_version()}"]
    known += [f"{name} {version}" for name, version in versions if version]
    machine = [platform.platform(), f"{host.cpu_name()}, {host.threads()} threads"]
    machine.append(f"{host.memory() / 2**30:.0f} GiB")
    if host.has_gpu():
        _, total = host.gpu_memory()
        machine.append(f"{host.gpu_name()}, {total / 2**30:.0f} GiB")
    return [
        f"Versions: {', '.join(known)}",
        f"Machine: {'; '.join(machine)}",
        f"Command: {hide_known(hide(shlex.join(sys.argv)))}",
    ]
