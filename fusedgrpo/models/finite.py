"""Whether weights are finite: they are read once, and nothing of their size is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fusedgrpo.errors import ModelError

CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """The largest absolute value of all, NaN where there is one; a scalar that nobody waits for."""
    full = [tensor.detach() for tensor in tensors if tensor.numel()]
    if not full:
        return torch.zeros(())
    return torch.nn.utils.get_total_norm(full, norm_type=math.inf)


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The first tensor that holds something else than finite numbers, in words; None if none does.

    4-bit weights are looked at through the scales of their blocks.
    """
    for name, tensor in named:
        scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)
        for values in (tensor, scales):
            if values is None or values.dtype not in CHECKED or values.is_meta:
                continue
            flat = values.detach()
            if flat.numel() and not all(map(math.isfinite, map(float, flat.aminmax()))):
                bad = ~flat.isfinite()
                where = tuple(bad.nonzero()[0].tolist())
                return (
                    f"{name} has {int(bad.sum())} of {flat.numel()} values that are not finite, "
                    f"the first at {list(where)}"
                )
    return None


def check_loaded(model: nn.Module) -> None:
    """Raise ModelError if a weight of a model is NaN or infinite."""
    problem = not_finite(model.named_parameters())
    if problem is not None:
        raise ModelError(
            f"The model cannot be trained: {problem}. Expected finite weights: are its files "
            "whole, or were they saved by a run that had diverged?"
        )
