"""Which precision a run computes in, and which its weights are stored in."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

from fusedgrpo import host
from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

log = logging.getLogger("fusedgrpo")


def asked_compute_dtype(bf16: bool | None, fp16: bool) -> torch.dtype | None:
    """The dtype of autocast on a device that has all of them, None for float32."""
    if fp16:
        return torch.float16
    return None if bf16 is False else torch.bfloat16


def pick_compute_dtype(bf16: bool | None, fp16: bool, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32.

    Unless ``bf16`` is False: bfloat16 where the device has it; on a GPU without it (Turing and
    older) float16, on a CPU without it float32, and both are said. There ``bf16=True`` is an error
    on a GPU, and float32 on a CPU: more exact and faster. Raises ConfigError.
    """
    on_gpu = device.type == "cuda"
    if fp16 and not on_gpu:
        raise ConfigError(
            "fp16: true needs a CUDA device, and so does bnb_4bit_compute_dtype=float16; on a CPU "
            "leave it out, or compute in float32."
        )
    asked = asked_compute_dtype(bf16, fp16)
    if asked != torch.bfloat16 or host.has_bfloat16(device):
        return asked
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


def stored_dtype(config: GRPOConfig, computed: torch.dtype | None) -> torch.dtype | None:
    """The dtype of weights that are not quantised, None for the one of their files.

    ``dtype: auto`` is that of the files for frozen weights where the run computes in bfloat16,
    float16 where it computes in that, and float32 for weights that train: bfloat16 weights lose
    updates below 1/256 of their size. computed: what ``pick_compute_dtype`` said. Linear layers may
    be cast after that: see ``resting_dtype``.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if config.finetuning_type == "full" or computed is None:
        return torch.float32
    return computed if computed == torch.float16 else None


def resting_dtype(config: GRPOConfig, computed: torch.dtype | None) -> torch.dtype | None:
    """The dtype that frozen linear layers are cast to once they are loaded, where their files have
    float32 and nobody has asked for a dtype; None for no cast. computed: as in ``stored_dtype``."""
    if config.dtype != "auto" or config.finetuning_type == "full":
        return None
    return computed


@functools.cache
def _say(message: str) -> None:
    log.info(message)
