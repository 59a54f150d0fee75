"""One softmax out of the partial ones of a row's splits, in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _merged(
    high, total, product, high_ptr, total_ptr, product_ptr, first, after, stride, place, dims,
    D: tl.constexpr,
):  # fmt: skip
    """``high, total, product`` with the parts of splits ``first`` to before ``after`` at ``place``,
    one after the other. stride: from split to split."""
    for split in range(first, after):
        at = split * stride + place
        part = tl.load(high_ptr + at)
        higher = tl.maximum(high, part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept = tl.exp(high - base)
        scale = tl.exp(part - base)
        total = total * kept + tl.load(total_ptr + at) * scale
        values = tl.load(product_ptr + at * D + dims, mask=dims < D, other=0.0)
        product = product * kept + values * scale
        high = higher
    return high, total, product


@triton.jit(
    do_not_specialize=["M", "groups", "prompt_splits"],
    do_not_specialize_on_alignment=["high_ptr", "total_ptr"],
)
def merge_kernel(
    out_ptr, high_ptr, total_ptr, product_ptr, prompt_lengths_ptr, cu_rows_ptr, own_lengths_ptr,
    M, groups, prompt_splits,
    H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out [M, H, D]`` of ``[splits, M, H]`` maxima and sums and ``[splits, M, H, D]`` products,
    those of the prompts before those of the rows' own keys. Only splits that hold a key in sight
    are read: the others may not have been written. BLOCK: groups that are looked at together."""
    program = tl.program_id(0).to(tl.int64)
    row = program // H
    group = 0
    for at in range(0, groups, BLOCK):
        g = at + tl.arange(0, BLOCK)
        end = tl.load(cu_rows_ptr + 1 + g, mask=g < groups, other=2**30)
        group += tl.sum((end <= row).to(tl.int32), 0)
    prompt = tl.load(prompt_lengths_ptr + group).to(tl.int32)
    own = tl.load(own_lengths_ptr + row).to(tl.int32)
    prompt_low = 0
    own_low = 0
    if WINDOW != 0:
        prompt_low = tl.maximum(prompt + own - WINDOW, 0)
        own_low = tl.maximum(own - WINDOW, 0)
    dims = tl.arange(0, PAD)
    stride = M.to(tl.int64) * H
    high = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    product = tl.zeros([PAD], tl.float32)
    high, total, product = _merged(
        high, total, product, high_ptr, total_ptr, product_ptr,
        prompt_low // SPLIT, tl.cdiv(prompt, SPLIT), stride, program, dims, D,
    )  # fmt: skip
    high, total, product = _merged(
        high, total, product, high_ptr, total_ptr, product_ptr,
        prompt_splits + own_low // SPLIT, prompt_splits + tl.cdiv(own, SPLIT), stride, program,
        dims, D,
    )  # fmt: skip
    tl.store(
        out_ptr + program * D + dims, (product / total).to(out_ptr.dtype.element_ty), mask=dims < D
    )
