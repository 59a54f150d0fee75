"""The end of a pass over the vocabulary, in Triton: log-probs, entropies and their gradients."""

# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import row_launch
from fusedgrpo.kernels.logprob.logit_triton import base_of
from fusedgrpo.kernels.logprob.tiles import HeadOptions, OnlineSoftmax, RowStatistics
from fusedgrpo.kernels.triton_math import sigmoid, softplus


@triton.jit(
    do_not_specialize_on_alignment=[
        "high_ptr",
        "total_ptr",
        "first_ptr",
        "z_target_ptr",
        "slope_target_ptr",
        "target_ptr",
        "logp_ptr",
        "unit_ptr",
        "entropy_ptr",
    ]
)
def finish_kernel(
    high_ptr,
    total_ptr,
    first_ptr,
    z_target_ptr,
    slope_target_ptr,
    target_ptr,
    weight_ptr,
    weight_stride_v,
    weight_stride_h,
    acc_ptr,
    acc_first_ptr,
    logp_ptr,
    unit_ptr,
    entropy_ptr,
    dlogp_ptr,
    dentropy_ptr,
    H,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = base_of(tl.load(high_ptr + row))
    sum_others = tl.load(total_ptr + row)
    z_target = tl.load(z_target_ptr + row)
    x = tl.log(sum_others) + (base - z_target)
    logp = -softplus(x)
    # A NaN in the sum must not pass for "nothing but the target".
    none = sum_others == 0.0
    rest = sigmoid(x)
    p_target = sigmoid(-x)
    total = tl.where(none, 1.0, sum_others)
    log_rest = -softplus(-x)
    entropy = 0.0
    if entropy_ptr is not None:
        within = tl.where(none, 0.0, tl.log(total) - tl.load(first_ptr + row) / total)
        own = tl.where(p_target == 0.0, 0.0, p_target * logp)
        entropy = tl.where(rest == 0.0, 0.0, rest * (within - log_rest)) - own
    tl.store(logp_ptr + row, logp)
    tl.store(unit_ptr + row, rest * SLOPE)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    if dlogp_ptr is not None:
        target = tl.load(target_ptr + row)
        slope_target = tl.load(slope_target_ptr + row)
        pure = (rest == 0.0) | (p_target == 0.0)
        share = tl.where(pure, 0.0, p_target * (logp + entropy) / rest)
        # log p_j + H where z_j = high
        level = tl.where(none, 0.0, log_rest - tl.log(total) + entropy)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < H
            w_offset = target * weight_stride_v + cols.to(tl.int64) * weight_stride_h
            w = tl.load(weight_ptr + w_offset, mask=inside, other=0.0).to(tl.float32)
            w = w * slope_target
            mean_w = tl.load(acc_ptr + row * H + cols, mask=inside, other=0.0) / total
            dlogp = w - mean_w
            tl.store(dlogp_ptr + row * H + cols, dlogp.to(dlogp_ptr.dtype.element_ty), mask=inside)
            if dentropy_ptr is not None:
                mean_first = tl.load(acc_first_ptr + row * H + cols, mask=inside, other=0.0) / total
                dentropy = -(share * w + mean_first + level * mean_w)
                tl.store(
                    dentropy_ptr + row * H + cols,
                    dentropy.to(dentropy_ptr.dtype.element_ty),
                    mask=inside,
                )


def finish(
    softmax: OnlineSoftmax,
    target: Tensor,
    weight: Tensor,
    head: HeadOptions,
    acc: Tensor | None,
    acc_first: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    *,
    want_entropy: bool,
) -> RowStatistics:
    R, H = len(target), weight.shape[1]
    launch = row_launch(H)
    logp, unit = torch.empty_like(softmax.total), torch.empty_like(softmax.total)
    want_entropy = want_entropy or dentropy is not None
    entropy = torch.empty_like(softmax.total) if want_entropy else softmax.total.new_empty(0)
    finish_kernel[(R,)](
        softmax.high,
        softmax.total,
        softmax.first,
        softmax.z_target,
        softmax.slope_target,
        target,
        weight,
        weight.stride(0),
        weight.stride(1),
        acc,
        acc_first,
        logp,
        unit,
        entropy if want_entropy else None,
        dlogp,
        dentropy,
        H,
        SLOPE=head.slope,
        BLOCK=launch.block,
        **launch.options(),
    )
    return RowStatistics(logp, softmax.z_target, entropy, unit)
