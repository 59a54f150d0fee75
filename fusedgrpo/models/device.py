"""Which precision a run computes in."""

from __future__ import annotations

import functools
import logging

import torch

from fusedgrpo import host
from fusedgrpo.errors import ConfigError

log = logging.getLogger("fusedgrpo")


def pick_compute_dtype(bf16: bool | None, fp16: bool, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32.

    Unless ``bf16`` is False: bfloat16 where the device has it; on a GPU without it (Turing and
    older) float16, on a CPU without it float32, and both are said. There ``bf16=True`` is an error
    on a GPU, and float32 on a CPU: more exact and faster. Raises ConfigError.
    """
    on_gpu = device.type == "cuda"
    if fp16:
        if not on_gpu:
            raise ConfigError("fp16: true needs a CUDA device; on a CPU leave it out.")
        return torch.float16
    if bf16 is False:
        return None
    if host.has_bfloat16(device):
        return torch.bfloat16
    if on_gpu:
        name = host.gpu_name(device)
        if bf16:
            raise ConfigError(
                f"bf16: true, but {name} has no bfloat16; leave it out, or use fp16: true."
            )
        _say(
            f"{name} has no bfloat16 instructions, so the run computes in float16, with a loss "
            "scale (bf16: false computes in float32)."
        )
        return torch.float16
    if bf16:
        _say("bf16: this CPU has no bfloat16 instructions, so the run computes in float32.")
    return None


@functools.cache
def _say(message: str) -> None:
    log.info(message)
