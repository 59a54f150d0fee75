"""The loss of a token and its derivatives, in Triton; ``terms.py`` has the table of them."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from fusedgrpo.kernels.triton_math import clamp, sigmoid


@triton.jit
def k3(d):
    """exp(d) - 1 - d, by its series where the difference would cancel."""
    series = 1.0 + d * (1.0 / 9)
    series = 1.0 + d * (1.0 / 8) * series
    series = 1.0 + d * (1.0 / 7) * series
    series = 1.0 + d * (1.0 / 6) * series
    series = 1.0 + d * (1.0 / 5) * series
    series = 1.0 + d * (1.0 / 4) * series
    series = 1.0 + d * (1.0 / 3) * series
    return tl.where(tl.abs(d) < 0.5, 0.5 * d * d * series, tl.exp(d) - 1.0 - d)


@triton.jit
def surrogate(
    ratio,
    advantage,
    logp,
    phi,
    KIND: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    DELTA: tl.constexpr,
    T_POS: tl.constexpr,
    T_NEG: tl.constexpr,
):
    """The loss, its derivative by the ratio, and by logp where it stands on its own; is the ratio
    clipped from below, from above."""
    zero = ratio * 0.0
    low = ratio < 0.0
    high = ratio < 0.0
    if KIND == "clipped":
        capped = ratio
        if DELTA is not None:
            capped = tl.where(ratio > DELTA, DELTA, ratio)
        a = capped * advantage
        b = clamp(ratio, LOWER, UPPER) * advantage
        a_counts = tl.where(a == b, 0.5, tl.where(a < b, 1.0, 0.0))
        b_counts = 1.0 - a_counts
        if DELTA is not None:
            a_counts = tl.where(ratio > DELTA, 0.0, a_counts)
        b_counts = tl.where((ratio < LOWER) | (ratio > UPPER), 0.0, b_counts)
        value = -tl.where(a < b, a, b)
        by_ratio = -advantage * (a_counts + b_counts)
        by_logp = zero
        low = (capped < LOWER) & (advantage < 0.0)
        high = (capped > UPPER) & (advantage > 0.0)
    elif KIND == "cispo":
        by_logp = -tl.where(ratio > UPPER, UPPER, ratio) * advantage
        by_ratio = zero
        value = by_logp * logp
        high = (ratio > UPPER) & (advantage > 0.0)
    elif KIND == "sapo":
        t = tl.where(advantage > 0.0, T_POS, T_NEG)
        x = t * (ratio - 1.0)
        value = -sigmoid(x) * 4.0 / t * advantage
        by_ratio = -4.0 * sigmoid(x) * sigmoid(-x) * advantage
        by_logp = zero
    else:
        by_logp = zero - phi * advantage
        by_ratio = zero
        value = by_logp * logp
    return value, by_ratio, by_logp, low, high
