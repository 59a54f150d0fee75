"""Which device and which dtypes a run computes in."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from fusedgrpo.errors import ConfigError

log = logging.getLogger("fusedgrpo")


def pick_device(use_cpu: bool) -> torch.device:
    """CUDA if there is one and the CPU was not asked for."""
    return torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")


@functools.cache
def has_native_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 matrix products run in hardware (elsewhere they are several times slower
    than float32: 6 to 7 times on an AVX2 CPU)."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags  # the last one: Arm


@functools.cache
def _say_float32() -> None:
    log.info("bf16: this CPU has no bfloat16 instructions, so the run computes in float32.")


def pick_compute_dtype(bf16: bool | None, fp16: bool, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32.

    bfloat16 where the device has it, unless ``bf16`` is False. ``bf16=True`` on a CPU without it
    means float32 (more exact and faster there), and is said; on a GPU without it it is an error.
    Raises ConfigError.
    """
    if fp16:
        if device.type != "cuda":
            raise ConfigError("fp16: true needs a CUDA device; on a CPU leave it out.")
        return torch.float16
    native = has_native_bfloat16(device.type)
    if bf16 and not native:
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"bf16: true, but {name} has no bfloat16; use fp16: true.")
        _say_float32()
    return torch.bfloat16 if native and bf16 is not False else None
