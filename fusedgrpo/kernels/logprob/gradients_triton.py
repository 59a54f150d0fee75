"""Gradients of a tile of logits, from the logits or from stored probabilities, in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import tile_launch
from fusedgrpo.kernels.logprob.logit_triton import base_of, head_constants, read_logits
from fusedgrpo.kernels.logprob.tiles import HeadOptions, RowStatistics
from fusedgrpo.kernels.triton_math import expm1


@triton.jit(
    do_not_specialize_on_alignment=[
        "target_ptr",
        "logp_ptr",
        "z_target_ptr",
        "entropy_ptr",
        "grad_logp_ptr",
        "grad_entropy_ptr",
    ]
)
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
    z_row = z_ptr + row * z_stride
    column = tl.load(target_ptr + row) - lo
    logp = tl.load(logp_ptr + row)
    z_target = tl.load(z_target_ptr + row)
    G = tl.load(grad_logp_ptr + row)
    at_target = -G * expm1(logp)
    if grad_entropy_ptr is not None:
        E = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        is_target = cols == column
        z, slope = read_logits(z_row, bias_ptr, cols, inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        log_p = tl.where(is_target, logp, (z - z_target) + logp)
        p = tl.exp(log_p)
        grad = tl.where(is_target, at_target, -G * p)
        if grad_entropy_ptr is not None:
            grad -= tl.where(p == 0.0, 0.0, E * p * (log_p + entropy))
        grad = grad * slope * (LOGIT_SCALE / TEMPERATURE)
        tl.store(dz_ptr + row * dz_stride + cols, grad.to(dz_ptr.dtype.element_ty), mask=inside)


def logit_gradient_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    statistics: RowStatistics,
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
        statistics.logp,
        statistics.z_target,
        None if grad_entropy is None else statistics.entropy,
        grad_logp,
        grad_entropy,
        dz,
        dz.stride(0),
        lo,
        K,
        **head_constants(head),
        BLOCK=launch.block,
        **launch.options(),
    )


@triton.jit(
    do_not_specialize_on_alignment=[
        "rows_ptr",
        "target_ptr",
        "high_ptr",
        "logp_ptr",
        "z_target_ptr",
        "factor_ptr",
        "at_target_ptr",
    ]
)
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
    base = base_of(tl.load(high_ptr + source))
    log_scale = base - tl.load(z_target_ptr + row) + tl.load(logp_ptr + row)
    scale = -tl.load(factor_ptr + row) * tl.exp(log_scale)
    at_target = tl.load(at_target_ptr + row)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        p = tl.load(p_ptr + source * p_stride + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.where(cols == column, at_target, p * scale)
        tl.store(dz_ptr + row * dz_stride + cols, grad.to(dz_ptr.dtype.element_ty), mask=inside)


def stored_gradient_tile(
    p: Tensor,
    rows: Tensor,
    target: Tensor,
    lo: int,
    high: Tensor,
    statistics: RowStatistics,
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
        statistics.logp,
        statistics.z_target,
        factor,
        at_target,
        dz,
        dz.stride(0),
        lo,
        K,
        BLOCK=launch.block,
        **launch.options(),
    )
