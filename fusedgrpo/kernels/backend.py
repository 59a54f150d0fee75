"""Which implementation of an operation runs: chosen in one place and said once."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]

log = logging.getLogger("fusedgrpo")


def resolve_backend(backend: str, op: str, device: torch.device) -> Literal["torch"]:
    """The implementation of ``op`` that runs for ``backend`` on ``device``.

    ``auto`` takes the fastest one there is and says so once per operation and kind of device.
    Raises ValueError for an unknown name and RuntimeError for an implementation that was asked for
    by name and cannot run: a run never falls back silently.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r}: expected 'auto', 'triton' or 'torch'.")
    if backend == "triton":
        raise RuntimeError(
            f"backend='triton': this version of fusedgrpo has no Triton kernel for {op}; "
            "use backend='torch' or 'auto'."
        )
    if backend == "auto":
        _say_choice(op, "torch", device.type)
    return "torch"


@functools.cache
def _say_choice(op: str, choice: str, device_type: str) -> None:
    log.debug("%s on %s: %s backend", op, device_type, choice)
