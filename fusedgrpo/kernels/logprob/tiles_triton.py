"""The functions of ``tiles.py`` as Triton kernels: one program per row, no atomics, float32.

``z`` stays what the GEMM left: the finished logits exist in registers only. The first loop of a
program reads its row of the tile from memory, later ones from cache.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import row_launch, tile_launch
from fusedgrpo.kernels.logprob.tiles import Finished, HeadOptions, Running


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation: Kahan's correction of an exp that was rounded to u."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, (u - 1.0) * x / tl.log(u)))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)); log1p by Kahan's correction."""
    y = tl.exp(-tl.abs(x))
    u = 1.0 + y
    log1p = tl.where(u == 1.0, y, tl.log(u) * y / (u - 1.0))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _finished(x, bias, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """The logit of GEMM result ``x``, and the softcap's slope there (1 without one)."""
    x = x + bias
    if SOFTCAP == 0.0:
        z, slope = x * (LOGIT_SCALE / TEMPERATURE), 1.0
    else:
        x = x * (LOGIT_SCALE / SOFTCAP)
        t = _expm1(-2.0 * tl.abs(x))
        tanh = -t / (2.0 + t)
        tanh = tl.where(x < 0, -tanh, tanh)
        z, slope = tanh * (SOFTCAP / TEMPERATURE), 1.0 - tanh * tanh
    return z, slope


@triton.jit
def _base(high):
    """What is subtracted before exp: the maximum, or 0 where no other column was seen yet."""
    return tl.where(high == float("-inf"), 0.0, high)


@triton.jit
def softmax_tile_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    target_ptr,
    p_ptr,
    p_stride,
    high_ptr,
    total_ptr,
    first_ptr,
    shift_ptr,
    z_target_ptr,
    slope_target_ptr,
    lo,
    width,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WANT_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    column = tl.load(target_ptr + row) - lo
    here = (column >= 0) & (column < width)

    before = tl.load(high_ptr + row)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(z_row + cols, mask=inside, other=0.0)
        z, _ = _finished(x, bias, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        highest = tl.maximum(highest, tl.where(inside & (cols != column), z, float("-inf")))
    high = tl.maximum(before, tl.max(highest, 0))
    base = _base(high)
    shift = tl.where(before == float("-inf"), 0.0, before - base)

    # No store in this loop, and another block size in the one that stores: this one is laid out by
    # its load then, sums have one order in every variant, and scoring gives the bits of the update.
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(z_row + cols, mask=inside, other=0.0)
        z, _ = _finished(x, bias, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        e = tl.where(inside & (cols != column), tl.exp(z - base), 0.0)
        total += e
        if WANT_FIRST:
            first += tl.where(e > 0, e * (z - base), 0.0)
    if p_ptr is not None:
        for start in range(0, width, BLOCK // 2):
            cols = start + tl.arange(0, BLOCK // 2)
            inside = cols < width
            bias = 0.0
            if bias_ptr is not None:
                bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(z_row + cols, mask=inside, other=0.0)
            z, slope = _finished(x, bias, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
            p = tl.where(cols != column, tl.exp(z - base) * slope, 0.0)
            tl.store(p_ptr + row * p_stride + cols, p.to(p_ptr.dtype.element_ty), mask=inside)

    rescale = tl.exp(shift)
    total_before = tl.load(total_ptr + row)
    if WANT_FIRST:
        first_before = tl.load(first_ptr + row)
        moved = rescale * (first_before + shift * total_before)
        tl.store(first_ptr + row, moved + tl.sum(first, 0))
    tl.store(total_ptr + row, rescale * total_before + tl.sum(total, 0))
    tl.store(high_ptr + row, high)
    tl.store(shift_ptr + row, shift)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=here, other=0.0).to(tl.float32)
    x = tl.load(z_row + column, mask=here, other=0.0)
    z, slope = _finished(x, bias, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
    tl.store(z_target_ptr + row, z, mask=here)
    tl.store(slope_target_ptr + row, slope, mask=here)


@triton.jit
def moment_tile_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    target_ptr,
    p_ptr,
    p_stride,
    high_ptr,
    lo,
    width,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(target_ptr + row) - lo
    base = _base(tl.load(high_ptr + row))
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(z_ptr + row * z_stride + cols, mask=inside, other=0.0)
        z, slope = _finished(x, bias, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        e = tl.where(inside & (cols != column), tl.exp(z - base), 0.0)
        moment = tl.where(e > 0, e * (z - base), 0.0) * slope
        tl.store(p_ptr + row * p_stride + cols, moment.to(p_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rescale_kernel(acc_ptr, first_ptr, shift_ptr, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    shift = tl.load(shift_ptr + row)
    # The maximum of most rows is found in their first tiles: nothing moves after that.
    if shift != 0.0:
        factor = tl.exp(shift)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < H
            acc = tl.load(acc_ptr + row * H + cols, mask=inside, other=0.0)
            if first_ptr is not None:
                first = tl.load(first_ptr + row * H + cols, mask=inside, other=0.0)
                tl.store(first_ptr + row * H + cols, (first + shift * acc) * factor, mask=inside)
            tl.store(acc_ptr + row * H + cols, acc * factor, mask=inside)


@triton.jit
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
    u_ptr,
    v_ptr,
    H,
    SLOPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = _base(tl.load(high_ptr + row))
    sum_others = tl.load(total_ptr + row)
    z_target = tl.load(z_target_ptr + row)
    x = tl.log(sum_others) + (base - z_target)
    logp = -_softplus(x)
    # A NaN in the sum must not pass for "nothing but the target".
    none = sum_others == 0.0
    rest = _sigmoid(x)
    p_target = _sigmoid(-x)
    total = tl.where(none, 1.0, sum_others)
    log_rest = -_softplus(-x)
    entropy = 0.0
    if entropy_ptr is not None:
        within = tl.where(none, 0.0, tl.log(total) - tl.load(first_ptr + row) / total)
        own = tl.where(p_target == 0.0, 0.0, p_target * logp)
        entropy = tl.where(rest == 0.0, 0.0, rest * (within - log_rest)) - own
    tl.store(logp_ptr + row, logp)
    tl.store(unit_ptr + row, rest * SLOPE)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)
    if u_ptr is not None:
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
            u = w - mean_w
            tl.store(u_ptr + row * H + cols, u.to(u_ptr.dtype.element_ty), mask=inside)
            if v_ptr is not None:
                mean_first = tl.load(acc_first_ptr + row * H + cols, mask=inside, other=0.0) / total
                v = -(share * w + mean_first + level * mean_w)
                tl.store(v_ptr + row * H + cols, v.to(v_ptr.dtype.element_ty), mask=inside)


@triton.jit
def logit_gradient_tile_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    target_ptr,
    logp_ptr,
    z_target_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    dz_ptr,
    dz_stride,
    lo,
    width,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.load(target_ptr + row) - lo
    logp = tl.load(logp_ptr + row)
    z_target = tl.load(z_target_ptr + row)
    G = tl.load(grad_logp_ptr + row)
    at_target = -G * _expm1(logp)
    if grad_entropy_ptr is not None:
        E = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        is_target = cols == column
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(z_ptr + row * z_stride + cols, mask=inside, other=0.0)
        z, slope = _finished(x, bias, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        log_p = tl.where(is_target, logp, (z - z_target) + logp)
        p = tl.exp(log_p)
        grad = tl.where(is_target, at_target, -G * p)
        if grad_entropy_ptr is not None:
            grad -= tl.where(p == 0.0, 0.0, E * p * (log_p + entropy))
        grad = grad * slope * (LOGIT_SCALE / TEMPERATURE)
        tl.store(dz_ptr + row * dz_stride + cols, grad.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def stored_gradient_tile_kernel(
    p_ptr,
    p_stride,
    rows_ptr,
    target_ptr,
    high_ptr,
    logp_ptr,
    z_target_ptr,
    factor_ptr,
    at_target_ptr,
    dz_ptr,
    dz_stride,
    lo,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(rows_ptr + row)
    column = tl.load(target_ptr + row) - lo
    base = _base(tl.load(high_ptr + source))
    log_scale = base - tl.load(z_target_ptr + row) + tl.load(logp_ptr + row)
    scale = -tl.load(factor_ptr + row) * tl.exp(log_scale)
    at_target = tl.load(at_target_ptr + row)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        p = tl.load(p_ptr + source * p_stride + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(cols == column, at_target, p * scale)
        tl.store(dz_ptr + row * dz_stride + cols, grad.to(dz_ptr.dtype.element_ty), mask=inside)


def _head_constants(head: HeadOptions) -> dict[str, Any]:
    return {
        "LOGIT_SCALE": head.logit_scale,
        "SOFTCAP": head.softcap or 0.0,
        "TEMPERATURE": head.temperature,
    }


def softmax_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    run: Running,
    p: Tensor | None,
    *,
    want_first: bool,
) -> None:
    R, K = z.shape
    launch = tile_launch(K)
    softmax_tile_kernel[(R,)](
        z,
        z.stride(0),
        bias,
        target,
        p,
        0 if p is None else p.stride(0),
        run.high,
        run.total,
        run.first,
        run.shift,
        run.z_target,
        run.slope_target,
        lo,
        K,
        **_head_constants(head),
        WANT_FIRST=want_first,
        BLOCK=launch.block,
        **launch.options(),
    )


def moment_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    run: Running,
    p: Tensor,
) -> None:
    R, K = z.shape
    launch = tile_launch(K)
    moment_tile_kernel[(R,)](
        z,
        z.stride(0),
        bias,
        target,
        p,
        p.stride(0),
        run.high,
        lo,
        K,
        **_head_constants(head),
        BLOCK=launch.block,
        **launch.options(),
    )


def rescale(acc: Tensor, acc_first: Tensor | None, shift: Tensor) -> None:
    R, H = acc.shape
    launch = row_launch(H)
    rescale_kernel[(R,)](
        acc,
        acc_first,
        shift,
        H,
        BLOCK=launch.block,
        **launch.options(),
    )


def finish(
    run: Running,
    target: Tensor,
    weight: Tensor,
    head: HeadOptions,
    acc: Tensor | None,
    acc_first: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    *,
    want_entropy: bool,
) -> Finished:
    R, H = len(target), weight.shape[1]
    launch = row_launch(H)
    logp, unit = torch.empty_like(run.total), torch.empty_like(run.total)
    want_entropy = want_entropy or v is not None
    entropy = torch.empty_like(run.total) if want_entropy else run.total.new_empty(0)
    finish_kernel[(R,)](
        run.high,
        run.total,
        run.first,
        run.z_target,
        run.slope_target,
        target,
        weight,
        weight.stride(0),
        weight.stride(1),
        acc,
        acc_first,
        logp,
        unit,
        entropy if want_entropy else None,
        u,
        v,
        H,
        SLOPE=head.slope,
        BLOCK=launch.block,
        **launch.options(),
    )
    return Finished(logp, run.z_target, entropy, unit)


def logit_gradient_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    done: Finished,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    dz: Tensor,
) -> None:
    R, K = z.shape
    launch = tile_launch(K)
    logit_gradient_tile_kernel[(R,)](
        z,
        z.stride(0),
        bias,
        target,
        done.logp,
        done.z_target,
        None if grad_entropy is None else done.entropy,
        grad_logp,
        grad_entropy,
        dz,
        dz.stride(0),
        lo,
        K,
        **_head_constants(head),
        BLOCK=launch.block,
        **launch.options(),
    )


def stored_gradient_tile(
    p: Tensor,
    rows: Tensor,
    target: Tensor,
    lo: int,
    high: Tensor,
    done: Finished,
    factor: Tensor,
    at_target: Tensor,
    dz: Tensor,
) -> None:
    r, K = dz.shape
    launch = tile_launch(K)
    stored_gradient_tile_kernel[(r,)](
        p,
        p.stride(0),
        rows,
        target,
        high,
        done.logp,
        done.z_target,
        factor,
        at_target,
        dz,
        dz.stride(0),
        lo,
        K,
        BLOCK=launch.block,
        **launch.options(),
    )
