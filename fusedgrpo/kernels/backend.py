"""Which implementation of an operation runs: chosen in one place and said once."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal

import torch

from fusedgrpo import host

Backend = Literal["auto", "triton", "torch"]
Resolved = Literal["triton", "torch"]

# Turing is the oldest generation that Triton 3 compiles for.
MIN_CUDA_CAPABILITY = (7, 5)

log = logging.getLogger("fusedgrpo")


def resolve_backend(
    backend: str, op: str, device: torch.device, dtype: torch.dtype | None = None
) -> Resolved:
    """The implementation of ``op`` that runs for ``backend`` on ``device``.

    ``auto`` takes Triton on a GPU that has it, else torch, and says so once per operation and kind
    of device. On the CPU Triton runs under its interpreter only (``TRITON_INTERPRET=1`` set before
    the first import): for tests, thousands of times slower, so never chosen by ``auto``.
    Raises ValueError for an unknown name and RuntimeError for an implementation that was asked for
    by name and cannot run: a run never falls back silently.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend={backend!r}: expected 'auto', 'triton' or 'torch'.")
    if backend == "torch":
        return "torch"
    obstacle = triton_obstacle(device, dtype)
    if backend == "triton":
        if obstacle is not None:
            raise RuntimeError(
                f"backend='triton' for {op} on {device}: {obstacle}. "
                "Use backend='auto' or 'torch' for the plain-torch implementation."
            )
        return "triton"
    choice = _automatic(device, obstacle)
    if not torch.compiler.is_compiling():
        _say_choice(op, choice, device.type, obstacle)
    return choice


def chosen_backend(device: torch.device, dtype: torch.dtype | None = None) -> Resolved:
    """The implementation that ``auto`` takes on ``device``."""
    return _automatic(device, triton_obstacle(device, dtype))


def _automatic(device: torch.device, obstacle: str | None) -> Resolved:
    return "triton" if obstacle is None and device.type == "cuda" else "torch"


def triton_obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why no Triton kernel can run on tensors of ``device`` and ``dtype``; None if one can."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, and this is float64"
    if not _triton_installed():
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = _capability(device)
        if capability is not None and capability < MIN_CUDA_CAPABILITY:
            need = ".".join(map(str, MIN_CUDA_CAPABILITY))
            return f"compute capability {capability[0]}.{capability[1]}, Triton needs {need}"
        return None
    if device.type == "cpu":
        return None if interpreted() else "the CPU runs Triton only under TRITON_INTERPRET=1"
    return f"there are no Triton kernels for {device.type}"


@functools.cache
def interpreted() -> bool:
    """Do kernels run in Triton's interpreter? Fixed once triton is imported, so read once."""
    if not _triton_installed():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_turing(device: torch.device) -> bool:
    """Whether ``device`` is an NVIDIA GPU before Ampere: other launches fit its registers."""
    capability = _capability(device) if device.type == "cuda" else None
    return capability is not None and capability < (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return host.gpu_capability(device)


@functools.cache
def _say_choice(op: str, choice: str, device_type: str, obstacle: str | None) -> None:
    if device_type == "cuda" and obstacle is not None:
        log.warning("%s on %s: %s backend (%s)", op, device_type, choice, obstacle)
    else:
        log.debug("%s on %s: %s backend", op, device_type, choice)
