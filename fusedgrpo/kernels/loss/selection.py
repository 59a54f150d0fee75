"""Tokens that a loss leaves its surrogate out of: low entropy, and completions too far off policy.

High-entropy tokens alone: arXiv 2506.01939. The off-policy mask over sequences: arXiv 2512.02556
(DeepSeek-V3.2). Names and comparisons are TRL 1.16's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_threshold(entropy: Tensor, share: float) -> Tensor:
    """The entropy that the ``share`` of tokens with the most of it is at or above, of all tokens
    ``[N]`` of a step; infinity without tokens."""
    if not len(entropy):
        return entropy.new_full((), torch.inf)
    return torch.quantile(entropy.float(), 1 - share)


def near_policy(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    threshold: float,
) -> Tensor:
    """``[B]`` bool: False for a completion with a negative advantage whose mean ``old_logp - logp``
    over its tokens in ``mask`` is above ``threshold``.

    logp, old_logp: ``[N]``; a token with a NaN counts as one without a difference. mask: ``[N]``
    bool. advantages: ``[B]``; cu_seqlens: ``[B+1]``.
    """
    gap = torch.nan_to_num(old_logp - logp.detach(), nan=0.0)
    gap = torch.where(mask, gap, 0.0)
    total, count = (
        torch.segment_reduce(x, "sum", offsets=cu_seqlens) for x in (gap, mask.to(gap.dtype))
    )
    return (advantages >= 0) | (total / count.clamp(min=1) <= threshold)
