"""The tokens of a completion and its sums over them, in Triton."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from fusedgrpo.kernels.loss.kl_triton import k3
from fusedgrpo.kernels.loss.types import MAX_LOG_RATIO, MIN_LOG_WEIGHT
from fusedgrpo.kernels.triton_math import clamp

_LIMIT = tl.constexpr(MAX_LOG_RATIO)
_LEAST = tl.constexpr(MIN_LOG_WEIGHT)


@triton.jit
def read_tokens(t, here, logp_ptr, old_ptr, mask_ptr, weight_ptr):
    """The tokens at ``t``: kept, dropped for their sampler weight, that weight, logp, and
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
def completion_sums(
    start,
    length,
    advantage,
    logp_ptr,
    old_ptr,
    ref_ptr,
    mask_ptr,
    weight_ptr,
    COMPLETION_WEIGHT: tl.constexpr,
    SURROGATE_OPTIONS: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    MEAN_PER_COMPLETION: tl.constexpr,
    CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over all tokens of a completion, where the options ask for them: how many are kept,
    their mean log-ratio, their weight phi, the sum of their sampler weights, and of k3."""
    lane = tl.arange(0, BLOCK)
    count = length.to(tl.float32)
    mean_log_ratio = 0.0
    phi = 0.0
    sum_weight = count
    sum_k3 = 0.0
    if (
        PER_SEQUENCE
        or COMPLETION_WEIGHT is not None
        or (MEAN_PER_COMPLETION and (mask_ptr is not None or weight_ptr is not None))
    ):
        counts = tl.zeros([BLOCK], tl.float32)
        log_ratios = tl.zeros([BLOCK], tl.float32)
        log_weights = tl.zeros([BLOCK], tl.float32)
        weights = tl.zeros([BLOCK], tl.float32)
        k3s = tl.zeros([BLOCK], tl.float32)
        for offset in range(0, length, BLOCK):
            t = start + offset + lane
            keep, _, weight, logp, log_ratio = read_tokens(
                t, offset + lane < length, logp_ptr, old_ptr, mask_ptr, weight_ptr
            )
            counts += tl.where(keep, 1.0, 0.0)
            log_ratios += log_ratio
            weights += tl.where(keep, weight, 0.0)
            if COMPLETION_WEIGHT is not None:
                log_weights += clamp(log_ratio, -_LIMIT, _LIMIT)
                if weight_ptr is not None:
                    log_weights += clamp(tl.log(weight), _LEAST, _LIMIT)
            if PER_SEQUENCE and ref_ptr is not None and CORRECTED:
                gap = tl.load(ref_ptr + t, mask=keep, other=0.0) - logp
                k3s += k3(clamp(gap, -_LIMIT, _LIMIT))
        count = tl.sum(counts)
        mean_log_ratio = tl.sum(log_ratios) / tl.where(count < 1.0, 1.0, count)
        sum_weight = tl.sum(weights)
        sum_k3 = tl.sum(k3s)
        if COMPLETION_WEIGHT is not None:
            log_w = clamp(tl.sum(log_weights), _LEAST, _LIMIT)
            phi = COMPLETION_WEIGHT(log_w, advantage, SURROGATE_OPTIONS)
    return count, mean_log_ratio, phi, sum_weight, sum_k3
