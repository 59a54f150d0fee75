"""The loss and the metrics of all completions from the partial sums of each, in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import ragged_launch
from fusedgrpo.kernels.loss.types import METRICS

# Columns of the partial sums, one row per completion.
LOSS = tl.constexpr(0)
COUNT = tl.constexpr(1)
LOW = tl.constexpr(2)
HIGH = tl.constexpr(3)
PHI = tl.constexpr(4)
KL = tl.constexpr(5)
ENTROPY = tl.constexpr(6)
CLAMPED = tl.constexpr(7)
DROPPED = tl.constexpr(8)
COLUMNS = tl.constexpr(9)


@triton.jit(
    do_not_specialize=["completions"],
    do_not_specialize_on_alignment=["sums_ptr", "denominator_ptr", "loss_ptr", "metrics_ptr"],
)
def metrics_kernel(
    sums_ptr,
    denominator_ptr,
    loss_ptr,
    metrics_ptr,
    completions,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the loss and the metrics of all completions, summed in a fixed order."""
    lane = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], tl.float32)
    tokens = tl.zeros([BLOCK], tl.float32)
    units = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.float32)
    highs = tl.zeros([BLOCK], tl.float32)
    clamps = tl.zeros([BLOCK], tl.float32)
    phis = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    drops = tl.zeros([BLOCK], tl.float32)
    least_low = tl.full([BLOCK], float("inf"), tl.float32)
    most_high = tl.full([BLOCK], -float("inf"), tl.float32)
    for offset in range(0, completions, BLOCK):
        here = offset + lane < completions
        row = sums_ptr + (offset + lane).to(tl.int64) * COLUMNS
        losses += tl.load(row + LOSS, mask=here, other=0.0)
        phis += tl.load(row + PHI, mask=here, other=0.0)
        kls += tl.load(row + KL, mask=here, other=0.0)
        entropies += tl.load(row + ENTROPY, mask=here, other=0.0)
        drops += tl.load(row + DROPPED, mask=here, other=0.0)
        count = tl.load(row + COUNT, mask=here, other=0.0)
        low = tl.load(row + LOW, mask=here, other=0.0)
        high = tl.load(row + HIGH, mask=here, other=0.0)
        clamped = tl.load(row + CLAMPED, mask=here, other=0.0)
        some = count > 0.0
        own = tl.where(some, count, 1.0)
        least_low = tl.minimum(least_low, tl.where(some, low / own, float("inf")))
        most_high = tl.maximum(most_high, tl.where(some, high / own, -float("inf")))
        tokens += count
        if PER_SEQUENCE:  # of what is constant in a completion, the mean over completions
            units += tl.where(some, 1.0, 0.0)
            lows += low / own
            highs += high / own
            clamps += clamped / own
        else:
            units += count
            lows += low
            highs += high
            clamps += clamped
    unit = tl.sum(units)
    unit = tl.where(unit < 1.0, 1.0, unit)
    token = tl.sum(tokens)
    token = tl.where(token < 1.0, 1.0, token)
    low = tl.min(least_low)
    high = tl.max(most_high)
    tl.store(loss_ptr, tl.sum(losses) / tl.load(denominator_ptr))
    tl.store(metrics_ptr + 0, tl.sum(lows) / unit)
    tl.store(metrics_ptr + 1, tl.where(low > 1.0, 0.0, low))
    tl.store(metrics_ptr + 2, tl.sum(highs) / unit)
    tl.store(metrics_ptr + 3, tl.where(high < 0.0, 0.0, high))
    tl.store(metrics_ptr + 4, (tl.sum(lows) + tl.sum(highs)) / unit)
    tl.store(metrics_ptr + 5, tl.sum(phis) / tl.maximum(completions, 1).to(tl.float32))
    tl.store(metrics_ptr + 6, tl.sum(kls) / token)
    tl.store(metrics_ptr + 7, tl.sum(entropies) / token)
    tl.store(metrics_ptr + 8, tl.sum(clamps) / unit)
    tl.store(metrics_ptr + 9, tl.sum(drops))


def loss_and_metrics(
    sums: Tensor, denominator: Tensor, *, per_sequence: bool
) -> tuple[Tensor, Tensor]:
    """The 0-dim loss and ``[len(METRICS)]`` of ``sums [B, COLUMNS]``."""
    launch = ragged_launch()
    loss, metrics = sums.new_empty(()), sums.new_empty(len(METRICS))
    metrics_kernel[(1,)](
        sums,
        denominator,
        loss,
        metrics,
        len(sums),
        PER_SEQUENCE=per_sequence,
        BLOCK=launch.block,
        **launch.options(),
    )
    return loss, metrics
