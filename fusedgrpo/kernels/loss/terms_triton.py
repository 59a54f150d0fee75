"""``terms.py`` as Triton kernels: one program per completion, then one over completions.

The advantage is broadcast, and every sum over a completion is taken, inside its program. Names and
lines follow the plain-torch version, where the derivation is.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import ragged_launch
from fusedgrpo.kernels.loss.types import MAX_LOG_RATIO, METRICS, MIN_LOG_WEIGHT, LossTerms
from fusedgrpo.loss_options import CLIPPED_LOSS_TYPES, LossOptions

# Columns of the partial sums, one row per completion.
_LOSS = tl.constexpr(0)
_COUNT = tl.constexpr(1)
_LOW = tl.constexpr(2)
_HIGH = tl.constexpr(3)
_PHI = tl.constexpr(4)
_KL = tl.constexpr(5)
_ENTROPY = tl.constexpr(6)
_CLAMPED = tl.constexpr(7)
_DROPPED = tl.constexpr(8)
_COLUMNS = tl.constexpr(9)

_LIMIT = tl.constexpr(MAX_LOG_RATIO)
_LEAST = tl.constexpr(MIN_LOG_WEIGHT)


def loss_terms_triton(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    options: LossOptions,
    *,
    counts: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    mask: Tensor | None,
    sampler_ratio: Tensor | None,
    entropy: Tensor | None,
) -> LossTerms:
    """Float32, int32 or int64 ``cu_seqlens``, bool ``mask``; all on the device of ``logp``."""
    logp, cu_seqlens = logp.contiguous(), cu_seqlens.contiguous()
    optional = {
        "counts": counts,
        "old": old_logp,
        "ref": ref_logp,
        "mask": None if mask is None else mask.view(torch.uint8),
        "weight": sampler_ratio,
        "entropy": entropy,
    }
    pointers = {
        f"{name}_ptr": None if x is None else x.contiguous() for name, x in optional.items()
    }
    launch = ragged_launch()
    completions = len(advantages)
    coefficient = torch.empty_like(logp)
    sums = logp.new_empty(completions, _COLUMNS.value)
    if completions:
        completion_kernel[(completions,)](
            logp,
            advantages.contiguous(),
            cu_seqlens,
            denominator,
            coefficient,
            sums,
            **pointers,
            **constants(options),
            BLOCK=launch.block,
            **launch.options(),
        )
    loss, metrics = logp.new_empty(()), logp.new_empty(len(METRICS))
    metrics_kernel[(1,)](
        sums,
        denominator,
        loss,
        metrics,
        completions,
        PER_SEQUENCE=options.importance_sampling_level == "sequence",
        BLOCK=launch.block,
        **launch.options(),
    )
    return LossTerms(loss, coefficient, metrics)


def constants(options: LossOptions) -> dict[str, Any]:
    clipped = options.loss_type in CLIPPED_LOSS_TYPES
    return {
        "KIND": "clipped" if clipped else options.loss_type,
        "PER_SEQUENCE": options.importance_sampling_level == "sequence",
        "MEAN_PER_COMPLETION": options.mean_per_completion,
        "LOWER": 1 - options.epsilon,
        "UPPER": 1 + options.upper if clipped else options.upper,
        "DELTA": options.delta,
        "BETA": options.beta,
        "CORRECTED": options.use_bias_correction_kl,
        "T_POS": options.sapo_temperature_pos,
        "T_NEG": options.sapo_temperature_neg,
        "K_POS": options.vespo_k_pos,
        "K_NEG": options.vespo_k_neg,
        "LAMBDA_POS": max(options.vespo_lambda_pos, 1e-4),
        "LAMBDA_NEG": max(options.vespo_lambda_neg, 1e-4),
    }


@triton.jit
def _clamp(x, least, most):
    """Like torch's: NaN stays NaN, where tl.clamp loses it."""
    return tl.where(x > most, most, tl.where(x < least, least, x))


@triton.jit
def _k3(d):
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
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _surrogate(
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
        b = _clamp(ratio, LOWER, UPPER) * advantage
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
        value = -_sigmoid(x) * 4.0 / t * advantage
        by_ratio = -4.0 * _sigmoid(x) * _sigmoid(-x) * advantage
        by_logp = zero
    else:
        by_logp = zero - phi * advantage
        by_ratio = zero
        value = by_logp * logp
    return value, by_ratio, by_logp, low, high


@triton.jit
def _read(
    t,
    here,
    logp_ptr,
    old_ptr,
    mask_ptr,
    weight_ptr,
):
    """Of the tokens at ``t``: kept, dropped for their sampler weight, that weight, logp, and
    logp - old_logp; a masked or dropped token reads as weight 1 and logp 0."""
    keep = here
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + t, mask=here, other=0) != 0)
    dropped = here & (t < 0)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + t, mask=keep, other=1.0)
        finite = tl.abs(weight) < float("inf")
        dropped = keep & (finite == 0)
        keep = keep & finite
        weight = tl.where(keep, weight, 1.0)
    logp = tl.load(logp_ptr + t, mask=keep, other=0.0)
    if old_ptr is not None:
        log_ratio = logp - tl.load(old_ptr + t, mask=keep, other=0.0)
    else:
        log_ratio = logp - logp
    if weight_ptr is None:
        weight = tl.zeros_like(logp) + 1.0
    return keep, dropped, weight, logp, log_ratio


@triton.jit
def completion_kernel(
    logp_ptr,
    advantages_ptr,
    cu_seqlens_ptr,
    denominator_ptr,
    coefficient_ptr,
    sums_ptr,
    counts_ptr,
    old_ptr,
    ref_ptr,
    mask_ptr,
    weight_ptr,
    entropy_ptr,
    KIND: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    MEAN_PER_COMPLETION: tl.constexpr,
    LOWER: tl.constexpr,
    UPPER: tl.constexpr,
    DELTA: tl.constexpr,
    BETA: tl.constexpr,
    CORRECTED: tl.constexpr,
    T_POS: tl.constexpr,
    T_NEG: tl.constexpr,
    K_POS: tl.constexpr,
    K_NEG: tl.constexpr,
    LAMBDA_POS: tl.constexpr,
    LAMBDA_NEG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + i).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i + 1).to(tl.int64) - start).to(tl.int32)
    advantage = tl.load(advantages_ptr + i)
    lane = tl.arange(0, BLOCK)

    # What a token needs to know of its whole completion.
    count = length.to(tl.float32)
    mean_log_ratio = 0.0
    phi = 0.0
    sum_weight = count
    sum_k3 = 0.0
    if (
        PER_SEQUENCE
        or KIND == "vespo"
        or (MEAN_PER_COMPLETION and (mask_ptr is not None or weight_ptr is not None))
    ):
        counts = tl.zeros([BLOCK], tl.float32)
        log_ratios = tl.zeros([BLOCK], tl.float32)
        log_weights = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        k3s = tl.zeros([BLOCK], tl.float32)
        for offset in range(0, length, BLOCK):
            t = start + offset + lane
            keep, _, weight, logp, log_ratio = _read(
                t, offset + lane < length, logp_ptr, old_ptr, mask_ptr, weight_ptr
            )
            counts += tl.where(keep, 1.0, 0.0)
            log_ratios += log_ratio
            weights += tl.where(keep, weight, 0.0)
            if KIND == "vespo":
                log_weights += _clamp(log_ratio, -_LIMIT, _LIMIT)
                if weight_ptr is not None:
                    log_weights += _clamp(tl.log(weight), _LEAST, _LIMIT)
            if PER_SEQUENCE and ref_ptr is not None and CORRECTED:
                gap = tl.load(ref_ptr + t, mask=keep, other=0.0) - logp
                k3s += _k3(_clamp(gap, -_LIMIT, _LIMIT))
        count = tl.sum(counts)
        mean_log_ratio = tl.sum(log_ratios) / tl.where(count < 1.0, 1.0, count)
        sum_weight = tl.sum(weights)
        sum_k3 = tl.sum(k3s)
        if KIND == "vespo":
            log_w = _clamp(tl.sum(log_weights), _LEAST, _LIMIT)
            k = tl.where(advantage >= 0.0, K_POS, K_NEG)
            lam = tl.where(advantage >= 0.0, LAMBDA_POS, LAMBDA_NEG)
            phi = tl.exp(lam + k * log_w - lam * tl.exp(log_w))

    share = 1.0 / tl.load(denominator_ptr)
    per_token = 1.0
    if MEAN_PER_COMPLETION:
        whole = count
        if counts_ptr is not None:
            whole = tl.load(counts_ptr + i)
        per_token = tl.where(whole < 1.0, 1.0, whole)
        share = share / per_token

    losses = tl.zeros([BLOCK], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.float32)
    highs = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    clamps = tl.zeros([BLOCK], tl.float32)
    drops = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, length, BLOCK):
        here = offset + lane < length
        t = start + offset + lane
        keep, dropped, weight, logp, log_ratio = _read(
            t, here, logp_ptr, old_ptr, mask_ptr, weight_ptr
        )
        log_weight = log_ratio
        if PER_SEQUENCE:
            log_weight = tl.zeros_like(logp) + mean_log_ratio
        clamped = tl.abs(log_weight) > _LIMIT
        ratio = tl.exp(_clamp(log_weight, -_LIMIT, _LIMIT))
        # Broadcast here: the interpreter cannot and a block of bools with a scalar one.
        spread = tl.zeros_like(logp) + advantage
        value, by_ratio, by_logp, low, high = _surrogate(
            ratio, spread, logp, phi, KIND, LOWER, UPPER, DELTA, T_POS, T_NEG
        )
        if PER_SEQUENCE:
            # The mean over the completion of what follows, token by token, at the other level.
            mean_of = tl.where(count < 1.0, 1.0, count)
            if weight_ptr is not None and KIND != "vespo":
                value = value * weight
                by_logp = by_logp * weight
                by_ratio = by_ratio * (sum_weight / mean_of)
            if ref_ptr is not None and CORRECTED:
                by_ratio = by_ratio + BETA * (sum_k3 / mean_of)
        elif weight_ptr is not None and KIND != "vespo":
            value = value * weight
            by_logp = by_logp * weight
            by_ratio = by_ratio * weight
        if ref_ptr is not None:
            gap = tl.load(ref_ptr + t, mask=keep, other=0.0) - logp
            d = _clamp(gap, -_LIMIT, _LIMIT)
            kl = _k3(d)
            kl_by_logp = tl.where(tl.abs(gap) > _LIMIT, 0.0, -(kl + d))
            if CORRECTED:
                if not PER_SEQUENCE:
                    by_ratio = by_ratio + BETA * kl
                kl = kl * ratio
                kl_by_logp = kl_by_logp * ratio
            value = value + BETA * kl
            by_logp = by_logp + BETA * kl_by_logp
            kls += tl.where(keep, kl, 0.0)
        through_ratio = tl.where(clamped, 0.0, by_ratio * ratio)
        coefficient = tl.where(keep, (through_ratio + by_logp) * share, 0.0)
        tl.store(coefficient_ptr + t, coefficient, mask=here)

        losses += tl.where(keep, value, 0.0)
        counts += tl.where(keep, 1.0, 0.0)
        lows += tl.where(keep & low, 1.0, 0.0)
        highs += tl.where(keep & high, 1.0, 0.0)
        clamps += tl.where(keep & clamped, 1.0, 0.0)
        drops += tl.where(dropped, 1.0, 0.0)
        if entropy_ptr is not None:
            entropies += tl.load(entropy_ptr + t, mask=keep, other=0.0)

    row = sums_ptr + i * _COLUMNS
    tl.store(row + _LOSS, tl.sum(losses) / per_token)
    tl.store(row + _COUNT, tl.sum(counts))
    tl.store(row + _LOW, tl.sum(lows))
    tl.store(row + _HIGH, tl.sum(highs))
    tl.store(row + _PHI, phi)
    tl.store(row + _KL, tl.sum(kls))
    tl.store(row + _ENTROPY, tl.sum(entropies))
    tl.store(row + _CLAMPED, tl.sum(clamps))
    tl.store(row + _DROPPED, tl.sum(drops))


@triton.jit(do_not_specialize=["completions"])
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
        row = sums_ptr + (offset + lane).to(tl.int64) * _COLUMNS
        losses += tl.load(row + _LOSS, mask=here, other=0.0)
        phis += tl.load(row + _PHI, mask=here, other=0.0)
        kls += tl.load(row + _KL, mask=here, other=0.0)
        entropies += tl.load(row + _ENTROPY, mask=here, other=0.0)
        drops += tl.load(row + _DROPPED, mask=here, other=0.0)
        count = tl.load(row + _COUNT, mask=here, other=0.0)
        low = tl.load(row + _LOW, mask=here, other=0.0)
        high = tl.load(row + _HIGH, mask=here, other=0.0)
        clamped = tl.load(row + _CLAMPED, mask=here, other=0.0)
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
