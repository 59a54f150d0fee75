"""The abilities of this machine: asked here and nowhere else.

The rest of the package calls these functions through the module (``host.has_bfloat16("cpu")``), so
that a test can put another answer in their place. Nothing but speed, memory and the precision that
was left open may follow from an answer.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fusedgrpo.errors import VersionError

if TYPE_CHECKING:
    import torch

CPUINFO = Path("/proc/cpuinfo")

# Torch is imported where it is asked, so that reading a version does not load it.


def has_gpu() -> bool:
    """Whether there is a GPU that torch can use."""
    import torch

    return torch.cuda.is_available()


def pick_device(use_cpu: bool) -> torch.device:
    """CUDA if there is one and the CPU was not asked for."""
    import torch

    return torch.device("cuda" if has_gpu() and not use_cpu else "cpu")


def gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def is_amd() -> bool:
    """Whether torch's GPUs are AMD's."""
    import torch

    return torch.version.hip is not None


def gpu_name(device: torch.device | int | None = None) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def gpu_memory(device: torch.device | int | None = None) -> tuple[int, int]:
    """Bytes that are free, and all of them."""
    import torch

    return torch.cuda.mem_get_info(device)


def gpu_capability(device: torch.device | int | None = None) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU; None for AMD's, which are counted otherwise."""
    import torch

    return None if is_amd() else torch.cuda.get_device_capability(device)


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 matrix products run in hardware (elsewhere they are several times slower
    than float32: 6 to 7 times on an AVX2 CPU)."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        capability = gpu_capability(device)
        return capability is None or capability >= (8, 0)
    flags = cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})  # the last one: Arm


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """Facts about the first processor; empty where the system does not say."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text().split("\n\n")[0].splitlines()
    parts = (line.partition(":") for line in first)
    return {key.strip(): value.strip() for key, _, value in parts}


def cpu_flags() -> frozenset[str]:
    """Extensions of the instruction set, by Linux' names."""
    found = _cpuinfo()
    return frozenset((found.get("flags") or found.get("Features", "")).split())


def cpu_name() -> str:
    """Model, family and vector instructions."""
    facts, flags = _cpuinfo(), cpu_flags()
    if not facts:
        return platform.machine()
    vector = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    name = facts.get("model name", platform.machine())
    family = "cpu family" in facts and f" family {facts['cpu family']} model {facts['model']}"
    return f"{name}{family or ''} ({' '.join(vector) or 'no AVX2'})"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Bytes of main memory that the machine has, whatever of it is free."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def threads() -> int:
    """With which torch computes on the CPU."""
    import torch

    return torch.get_num_threads()


def package_version(distribution: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# Of packages that every run needs: what an older one lacks shows only in the first update.
FLOORS = {"torch": "2.10", "transformers": "5.8", "peft": "0.18"}


def require_packages() -> None:
    """Raises VersionError for the first package that is older than it has to be; one that is not
    installed fails by itself where it is imported."""
    for name, floor in FLOORS.items():
        found = package_version(name)
        if found is not None and _numbers(found) < _numbers(floor):
            raise VersionError(
                f"fusedgrpo needs {name} {floor} or later, this is {found}. "
                f"Install it: pip install '{name}>={floor}'."
            )


def _numbers(version: str) -> tuple[int, ...]:
    """``"2.10.0a0+git1"`` is (2, 10, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
