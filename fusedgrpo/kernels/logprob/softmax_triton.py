"""The online softmax over a tile of logits, and what keeps its sums together, in Triton.

``z`` stays what the GEMM left: the logits exist in registers only. The first loop of a program
reads its row of the tile from memory, later ones from cache.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import row_launch, tile_launch
from fusedgrpo.kernels.logprob.logit_triton import base_of, head_constants, read_logits
from fusedgrpo.kernels.logprob.tiles import HeadOptions, OnlineSoftmax


@triton.jit(
    do_not_specialize_on_alignment=[
        "target_ptr",
        "high_ptr",
        "total_ptr",
        "first_ptr",
        "shift_ptr",
        "z_target_ptr",
        "slope_target_ptr",
    ]
)
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
        z, _ = read_logits(z_row, bias_ptr, cols, inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        highest = tl.maximum(highest, tl.where(inside & (cols != column), z, float("-inf")))
    high = tl.maximum(before, tl.max(highest, 0))
    base = base_of(high)
    shift = tl.where(before == float("-inf"), 0.0, before - base)

    # Do not fuse the store of p: Triton would pick another layout and reduction order, and scoring
    # and update would differ in the last bit. For the same reason the loop that stores has another
    # block size.
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        z, _ = read_logits(z_row, bias_ptr, cols, inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        e = tl.where(inside & (cols != column), tl.exp(z - base), 0.0)
        total += e
        if WANT_FIRST:
            first += tl.where(e > 0, e * (z - base), 0.0)
    if p_ptr is not None:
        for start in range(0, width, BLOCK // 2):
            cols = start + tl.arange(0, BLOCK // 2)
            inside = cols < width
            z, slope = read_logits(z_row, bias_ptr, cols, inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
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
    z, slope = read_logits(z_row, bias_ptr, column, here, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
    tl.store(z_target_ptr + row, z, mask=here)
    tl.store(slope_target_ptr + row, slope, mask=here)


def softmax_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    softmax: OnlineSoftmax,
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
        softmax.high,
        softmax.total,
        softmax.first,
        softmax.shift,
        softmax.z_target,
        softmax.slope_target,
        lo,
        K,
        **head_constants(head),
        WANT_FIRST=want_first,
        BLOCK=launch.block,
        **launch.options(),
    )


@triton.jit(do_not_specialize_on_alignment=["target_ptr", "high_ptr"])
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
    z_row = z_ptr + row * z_stride
    column = tl.load(target_ptr + row) - lo
    base = base_of(tl.load(high_ptr + row))
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        z, slope = read_logits(z_row, bias_ptr, cols, inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        e = tl.where(inside & (cols != column), tl.exp(z - base), 0.0)
        moment = tl.where(e > 0, e * (z - base), 0.0) * slope
        tl.store(p_ptr + row * p_stride + cols, moment.to(p_ptr.dtype.element_ty), mask=inside)


def moment_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    softmax: OnlineSoftmax,
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
        softmax.high,
        lo,
        K,
        **head_constants(head),
        BLOCK=launch.block,
        **launch.options(),
    )


@triton.jit(do_not_specialize_on_alignment=["shift_ptr"])
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
