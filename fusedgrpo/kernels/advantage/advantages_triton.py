"""The Triton kernel of ``group_advantages``: one program per output, over the rows of its group.

A program finds its group by its bounds (``group_size``) or by comparing ids (``group_ids``): B^2
comparisons instead of a sort, nothing for the batches of a run. Two passes, the mean and then the
squared deviations from it; every sum runs in a fixed order.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import group_launch


@triton.jit
def _scores(rewards, weights, rows, kept, column, F: tl.constexpr, PER_COLUMN: tl.constexpr):
    """Rewards of ``rows`` in ``column``, or the weighted sum of all; NaN where there is none.

    Rows that are not ``kept`` count as missing.
    """
    if PER_COLUMN:
        score = tl.load(rewards + rows * F + column, mask=kept, other=float("nan"))
    else:
        score = 0.0
        scorable = 0
        for f in tl.static_range(F):
            reward = tl.load(rewards + rows * F + f, mask=kept, other=float("nan"))
            term = reward * tl.load(weights + f)
            score += tl.where(term == term, term, 0.0)
            scorable += tl.where(reward == reward, 1, 0)
        score = tl.where(scorable > 0, score, float("nan"))
    return score


@triton.jit
def _statistics(
    rewards, weights, ids, group_id, first, size, column,
    F: tl.constexpr, PER_COLUMN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean, unbiased standard deviation (NaN for fewer than two), least and greatest score."""
    counts = tl.full([BLOCK], 0.0, tl.float32)
    sums = tl.full([BLOCK], 0.0, tl.float32)
    lows = tl.full([BLOCK], float("inf"), tl.float32)
    highs = tl.full([BLOCK], -float("inf"), tl.float32)
    for offset in range(0, size, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        member = index < size
        if ids is not None:
            member = member & (tl.load(ids + first + index, mask=member, other=0) == group_id)
        x = _scores(rewards, weights, first + index, member, column, F, PER_COLUMN)
        # Comparisons with NaN are false, which leaves it out.
        counts += tl.where(x == x, 1.0, 0.0)
        sums += tl.where(x == x, x, 0.0)
        lows = tl.where(x < lows, x, lows)
        highs = tl.where(x > highs, x, highs)
    count = tl.sum(counts, 0)
    mean = tl.div_rn(tl.sum(sums, 0), count)
    squares = tl.full([BLOCK], 0.0, tl.float32)
    for offset in range(0, size, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        member = index < size
        if ids is not None:
            member = member & (tl.load(ids + first + index, mask=member, other=0) == group_id)
        x = _scores(rewards, weights, first + index, member, column, F, PER_COLUMN)
        deviations = tl.where(x == x, x - mean, 0.0)
        squares += deviations * deviations
    std = tl.sqrt_rn(tl.div_rn(tl.sum(squares, 0), count - 1.0))
    return mean, std, tl.min(lows, 0), tl.max(highs, 0)


@triton.jit(do_not_specialize=["B", "group_size"])
def normalise_kernel(
    out, rewards, weights, ids, B, group_size,
    F: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, PER_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[i] = (x[i] - mean) / (std + EPS)`` of the scores x of ``rewards [B, F]``.

    PER_COLUMN: each column on its own, out is ``[B, F]`` and keeps NaN where a reward is missing;
    otherwise the weighted sum of the columns, out is ``[B]`` and 0 there. SCALE: whose standard
    deviation, "group" or "batch", or "none".
    """
    program = tl.program_id(0)
    if PER_COLUMN:
        row = program // F
        column = program % F
    else:
        row = program
        column = 0
    if ids is not None:
        group_id = tl.load(ids + row)
        start = row * 0
        size = B
    else:
        group_id = 0
        start = row // group_size * group_size
        size = group_size
    first = start.to(tl.int64)
    row = row.to(tl.int64)
    mean, std, low, high = _statistics(
        rewards, weights, ids, group_id, first, size, column, F, PER_COLUMN, BLOCK
    )
    if SCALE == "batch":
        _, std, _, _ = _statistics(
            rewards, weights, None, group_id, first * 0, B, column, F, PER_COLUMN, BLOCK
        )
    x = _scores(rewards, weights, row, row < B, column, F, PER_COLUMN)
    # The mean of equal numbers may round to a neighbour of theirs, so their difference is not 0.
    # This also covers a score that has no other to compare with.
    advantage = tl.where(low == high, 0.0, x - mean)
    if SCALE != "none":
        advantage = tl.div_rn(advantage, std + EPS)
    advantage = tl.where(advantage == advantage, advantage, 0.0)
    missing = float("nan") if PER_COLUMN else 0.0
    tl.store(out + program, tl.where(x == x, advantage, missing))


def group_advantages_triton(
    rewards_BF: Tensor,
    weights_F: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    scale_rewards: str,
    aggregation: str,
    eps: float,
) -> Tensor:
    """Advantages ``[B]``, in float32 throughout. Arguments as the custom op has checked them."""
    B = rewards_BF.shape[0]
    rewards_BF = rewards_BF.to(torch.float32).contiguous()
    weights_F = weights_F.to(torch.float32).contiguous()
    if group_ids is not None:
        group_ids = group_ids.to(torch.int64).contiguous()
    if aggregation == "sum_then_normalize":
        return _normalise(rewards_BF, weights_F, group_ids, group_size, scale_rewards, eps)
    z_BF = _normalise(rewards_BF, weights_F, group_ids, group_size, "group", eps, per_column=True)
    return _normalise(z_BF, weights_F, None, B, "group", eps)


def _normalise(
    rewards_BF: Tensor,
    weights_F: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    scale: str,
    eps: float,
    *,
    per_column: bool = False,
) -> Tensor:
    B, F = rewards_BF.shape
    out = torch.empty_like(rewards_BF) if per_column else rewards_BF.new_empty(B)
    launch = group_launch()
    normalise_kernel[(out.numel(),)](
        out,
        rewards_BF,
        weights_F,
        group_ids,
        B,
        group_size,
        F=F,
        EPS=eps,
        SCALE=scale,
        PER_COLUMN=per_column,
        BLOCK=launch.block,
        **launch.options(),
    )
    return out
