"""Checks and contexts that the custom operators share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def refuse_second_derivative(op: Any, name: str) -> None:
    """Makes a derivative of ``op``, the backward of ``name``, an error that says so."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} has no second derivative: its backward was differentiated. "
            "Call backward without create_graph=True."
        )

    op.register_autograd(backward)


@contextlib.contextmanager
def plain_arithmetic_on(x: Tensor) -> Iterator[None]:
    """For the body of an operator on ``x``: no autocast, and kernels launched on x's GPU."""
    device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with device, torch.autocast(x.device.type, enabled=False):
        yield


def autocast_operands(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where autocast is on, as a linear layer would take them."""
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device_type)
    return hidden.to(dtype), weight.to(dtype)


def check_operands(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    name: str = "targets",
) -> None:
    """Shapes and dtypes of a linear head's inputs; ValueError or TypeError.

    name: what ``targets``, an int64 for each row, are called.
    """
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected [..., H] and [V, H]."
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{name} has shape {tuple(targets.shape)} and dtype {targets.dtype}: "
            f"expected {tuple(hidden.shape[:-1])} and torch.int64."
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: expected one floating dtype "
            "(cast one of them, or run under autocast)."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},).")
    if mask is not None and (mask.shape != targets.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: "
            f"expected {tuple(targets.shape)} and torch.bool."
        )


def check_targets(target: Tensor, vocab: int) -> None:
    """One comparison for the whole batch: an id outside the vocabulary would read another row."""
    if len(target):
        low, high = torch.stack(target.aminmax()).tolist()
        check_target_range(low, high, vocab)


def check_target_range(low: int, high: int, vocab: int) -> None:
    """IndexError where the least or the greatest target is not of the vocabulary."""
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise IndexError(
            f"target id {bad} is outside the vocabulary of {vocab} (valid: 0 to {vocab - 1}). "
            "Do tokenizer and model belong together?"
        )
