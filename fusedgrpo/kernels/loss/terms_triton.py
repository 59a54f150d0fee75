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

from fusedgrpo.kernels.backend import is_turing
from fusedgrpo.kernels.launch import ragged_launch
from fusedgrpo.kernels.loss.completion_triton import completion_sums, read_tokens
from fusedgrpo.kernels.loss.kl_triton import k3
from fusedgrpo.kernels.loss.metrics_triton import (
    CLAMPED,
    COLUMNS,
    COUNT,
    DROPPED,
    ENTROPY,
    HIGH,
    KL,
    LOSS,
    LOW,
    PHI,
    loss_and_metrics,
)
from fusedgrpo.kernels.loss.surrogates.registry_triton import SURROGATES
from fusedgrpo.kernels.loss.types import MAX_LOG_RATIO, LossTerms, PerToken
from fusedgrpo.kernels.triton_math import clamp
from fusedgrpo.loss_options import LossOptions

_LIMIT = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _token_terms(
    t,
    keep,
    weight,
    logp,
    log_ratio,
    advantage,
    count,
    mean_log_ratio,
    phi,
    sum_weight,
    sum_k3,
    ref_ptr,
    weight_ptr,
    SURROGATE: tl.constexpr,
    SURROGATE_OPTIONS: tl.constexpr,
    WEIGHT_IN_PHI: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BETA: tl.constexpr,
    CORRECTED: tl.constexpr,
):
    """The loss of the tokens at ``t``, its derivative by their logp, their KL; is the ratio
    clipped from below, from above, clamped."""
    log_weight = log_ratio
    if PER_SEQUENCE:
        log_weight = tl.zeros_like(logp) + mean_log_ratio
    clamped = tl.abs(log_weight) > _LIMIT
    ratio = tl.exp(clamp(log_weight, -_LIMIT, _LIMIT))
    # Broadcast here: the interpreter cannot and a block of bools with a scalar one.
    spread = tl.zeros_like(logp) + advantage
    value, by_ratio, by_logp, low, high = SURROGATE(ratio, spread, logp, phi, SURROGATE_OPTIONS)
    if PER_SEQUENCE:
        # The mean over the completion of what follows, token by token, at the other level.
        mean_of = tl.where(count < 1.0, 1.0, count)
        if weight_ptr is not None and not WEIGHT_IN_PHI:
            value = value * weight
            by_logp = by_logp * weight
            by_ratio = by_ratio * (sum_weight / mean_of)
        if ref_ptr is not None and CORRECTED:
            by_ratio = by_ratio + BETA * (sum_k3 / mean_of)
    elif weight_ptr is not None and not WEIGHT_IN_PHI:
        value = value * weight
        by_logp = by_logp * weight
        by_ratio = by_ratio * weight
    kl = tl.zeros_like(logp)
    if ref_ptr is not None:
        gap = tl.load(ref_ptr + t, mask=keep, other=0.0) - logp
        d = clamp(gap, -_LIMIT, _LIMIT)
        kl = k3(d)
        kl_by_logp = tl.where(tl.abs(gap) > _LIMIT, 0.0, -(kl + d))
        if CORRECTED:
            if not PER_SEQUENCE:
                by_ratio = by_ratio + BETA * kl
            kl = kl * ratio
            kl_by_logp = kl_by_logp * ratio
        value = value + BETA * kl
        by_logp = by_logp + BETA * kl_by_logp
    through_ratio = tl.where(clamped, 0.0, by_ratio * ratio)
    return value, through_ratio + by_logp, kl, low, high, clamped


@triton.jit(
    do_not_specialize_on_alignment=[
        "logp_ptr",
        "advantages_ptr",
        "cu_seqlens_ptr",
        "denominator_ptr",
        "coefficient_ptr",
        "sums_ptr",
        "counts_ptr",
        "old_ptr",
        "ref_ptr",
        "mask_ptr",
        "weight_ptr",
        "entropy_ptr",
    ]
)
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
    SURROGATE: tl.constexpr,
    COMPLETION_WEIGHT: tl.constexpr,
    SURROGATE_OPTIONS: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    MEAN_PER_COMPLETION: tl.constexpr,
    BETA: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + i).to(tl.int64)
    length = (tl.load(cu_seqlens_ptr + i + 1).to(tl.int64) - start).to(tl.int32)
    advantage = tl.load(advantages_ptr + i)
    lane = tl.arange(0, BLOCK)
    count, mean_log_ratio, phi, sum_weight, sum_k3 = completion_sums(
        start, length, advantage, logp_ptr, old_ptr, ref_ptr, mask_ptr, weight_ptr,
        COMPLETION_WEIGHT, SURROGATE_OPTIONS, PER_SEQUENCE, MEAN_PER_COMPLETION, CORRECTED, BLOCK,
    )  # fmt: skip
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
        keep, dropped, weight, logp, log_ratio = read_tokens(
            t, here, logp_ptr, old_ptr, mask_ptr, weight_ptr
        )
        value, derivative, kl, low, high, clamped = _token_terms(
            t, keep, weight, logp, log_ratio, advantage, count, mean_log_ratio, phi, sum_weight,
            sum_k3, ref_ptr, weight_ptr, SURROGATE, SURROGATE_OPTIONS,
            COMPLETION_WEIGHT is not None, PER_SEQUENCE, BETA, CORRECTED,
        )  # fmt: skip
        coefficient = tl.where(keep, derivative * share, 0.0)
        tl.store(coefficient_ptr + t, coefficient, mask=here)

        losses += tl.where(keep, value, 0.0)
        counts += tl.where(keep, 1.0, 0.0)
        kls += tl.where(keep, kl, 0.0)
        lows += tl.where(keep & low, 1.0, 0.0)
        highs += tl.where(keep & high, 1.0, 0.0)
        clamps += tl.where(keep & clamped, 1.0, 0.0)
        drops += tl.where(dropped, 1.0, 0.0)
        if entropy_ptr is not None:
            entropies += tl.load(entropy_ptr + t, mask=keep, other=0.0)

    row = sums_ptr + i * COLUMNS
    tl.store(row + LOSS, tl.sum(losses) / per_token)
    tl.store(row + COUNT, tl.sum(counts))
    tl.store(row + LOW, tl.sum(lows))
    tl.store(row + HIGH, tl.sum(highs))
    tl.store(row + PHI, phi)
    tl.store(row + KL, tl.sum(kls))
    tl.store(row + ENTROPY, tl.sum(entropies))
    tl.store(row + CLAMPED, tl.sum(clamps))
    tl.store(row + DROPPED, tl.sum(drops))


def loss_terms_triton(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    options: LossOptions,
    per_token: PerToken,
    counts: Tensor | None,
) -> LossTerms:
    """Float32, int32 or int64 ``cu_seqlens``, bool ``mask``; all on the device of ``logp``."""
    mask = per_token.mask
    logp, cu_seqlens = logp.contiguous(), cu_seqlens.contiguous()
    optional = {
        "counts": counts,
        "old": per_token.old_logp,
        "ref": per_token.ref_logp,
        "mask": None if mask is None else mask.view(torch.uint8),
        "weight": per_token.sampler_ratio,
        "entropy": per_token.entropy,
    }
    pointers = {
        f"{name}_ptr": None if x is None else x.contiguous() for name, x in optional.items()
    }
    launch = ragged_launch(turing=is_turing(logp.device))
    completions = len(advantages)
    coefficient = torch.empty_like(logp)
    sums = logp.new_empty(completions, COLUMNS.value)
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
    loss, metrics = loss_and_metrics(sums, denominator, per_sequence=options.per_sequence)
    return LossTerms(loss, coefficient, metrics)


def constants(options: LossOptions) -> dict[str, Any]:
    surrogate = SURROGATES[options.kind.surrogate]
    return {
        "SURROGATE": surrogate.token_terms,
        "COMPLETION_WEIGHT": surrogate.completion_weight,
        "SURROGATE_OPTIONS": surrogate.constants(options),
        "PER_SEQUENCE": options.per_sequence,
        "MEAN_PER_COMPLETION": options.mean_per_completion,
        "BETA": options.beta,
        "CORRECTED": options.use_bias_correction_kl,
    }
