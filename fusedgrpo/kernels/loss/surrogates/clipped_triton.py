"""``clipped.py`` in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedgrpo.kernels.triton_math import clamp
from fusedgrpo.loss_options import LossOptions


class Constants(NamedTuple):
    lower: float
    upper: float
    delta: float | None


def constants(options: LossOptions) -> Constants:
    return Constants(1 - options.epsilon, 1 + options.upper, options.delta)


@triton.jit
def token_terms(ratio, advantage, logp, weight, OPTIONS: tl.constexpr):
    capped = ratio
    if OPTIONS.delta is not None:
        capped = tl.where(ratio > OPTIONS.delta, OPTIONS.delta, ratio)
    a = capped * advantage
    b = clamp(ratio, OPTIONS.lower, OPTIONS.upper) * advantage
    a_counts = tl.where(a == b, 0.5, tl.where(a < b, 1.0, 0.0))
    b_counts = 1.0 - a_counts
    if OPTIONS.delta is not None:
        a_counts = tl.where(ratio > OPTIONS.delta, 0.0, a_counts)
    b_counts = tl.where((ratio < OPTIONS.lower) | (ratio > OPTIONS.upper), 0.0, b_counts)
    value = -tl.where(a < b, a, b)
    by_ratio = -advantage * (a_counts + b_counts)
    low = (capped < OPTIONS.lower) & (advantage < 0.0)
    high = (capped > OPTIONS.upper) & (advantage > 0.0)
    return value, by_ratio, ratio * 0.0, low, high
