"""The denominator of a sum of token losses: known to the caller, so that any split adds up."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.loss.types import PerToken
from fusedgrpo.loss_options import LossOptions


def loss_denominator(
    options: LossOptions,
    logp: Tensor,
    completions: int,
    per_token: PerToken,
    num_items: float | Tensor | None,
    num_sequences: float | Tensor | None,
) -> Tensor:
    """The divisor of ``loss_terms``: a 0-dim tensor like ``logp [N]``, computed on its device."""
    mask, sampler_ratio = per_token.mask, per_token.sampler_ratio
    if options.kind.divided_by != "tokens":
        count = completions if num_sequences is None else num_sequences
    elif num_items is not None:
        count = num_items
    elif mask is None and sampler_ratio is None:
        count = len(logp)
    else:
        keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.bool()
        count = (keep if sampler_ratio is None else keep & sampler_ratio.isfinite()).sum()
    if isinstance(count, Tensor):
        count = count.to(logp.device, logp.dtype)
    else:  # not as_tensor, which waits for the GPU
        count = torch.full((), count, device=logp.device, dtype=logp.dtype)
    count = count.detach().clamp(min=1)
    if options.kind.divided_by == "longest":
        assert options.max_completion_length is not None
        count = count * options.max_completion_length
    return count
