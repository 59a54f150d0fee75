"""``decode_attention`` in Triton: partial softmaxes over splits of the keys, then their merge.

A program of ``prompt_kernel`` has one split of a prompt's keys, for one kv head, and the queries of
all rows and repeated heads of the group; one of ``own_kernel`` a split of one row's own keys.
``merge_kernel`` puts a row's splits together in their order. Splits and blocks begin at fixed
positions and the tile of queries has one size, so that a row's result is the same bits whatever
other rows, groups and widths of tables there are. The grid follows from shapes, and programs beyond
a length end at once: nothing waits for the GPU, and a CUDA graph can replay it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo import host
from fusedgrpo.kernels.backend import interpreted, is_turing
from fusedgrpo.kernels.decode.merge_triton import merge_kernel
from fusedgrpo.kernels.launch import (
    DECODE_LANES,
    DECODE_SPLIT,
    decode_launch,
    decode_merge_launch,
    decode_rows,
    power_of_two,
)
from fusedgrpo.kernels.triton_math import tanh


@triton.jit
def _attend(
    q, lows, keys_ptr, values_ptr, table_ptr, start, end,
    key_page, key_slot, value_page, value_slot,
    D: tl.constexpr, D_VALUE: tl.constexpr, PAD: tl.constexpr, PAD_VALUE: tl.constexpr,
    PAGE: tl.constexpr, SCALING: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Maximum, sum of exponentials and their product with the values, of ``q [rows, PAD]`` over the
    keys at positions ``start`` to before ``end`` that are not below each row's ``lows``.

    keys_ptr, values_ptr: at their head. ``*_page``, ``*_slot``: strides of pages and of keys.
    """
    ROWS: tl.constexpr = q.shape[0]
    dims = tl.arange(0, PAD)
    value_dims = tl.arange(0, PAD_VALUE)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS, PAD_VALUE], tl.float32)
    for at in range(start, end, BLOCK):
        position = at + tl.arange(0, BLOCK)
        inside = position < end
        page = tl.load(table_ptr + position // PAGE, mask=inside, other=0).to(tl.int64)
        slot = position % PAGE
        k = tl.load(
            keys_ptr + (page * key_page + slot * key_slot)[None, :] + dims[:, None],
            mask=inside[None, :] & (dims < D)[:, None],
            other=0.0,
        )
        v = tl.load(
            values_ptr + (page * value_page + slot * value_slot)[:, None] + value_dims[None, :],
            mask=inside[:, None] & (value_dims < D_VALUE)[None, :],
            other=0.0,
        )
        if INTERPRET:  # its dot is wrong in bfloat16
            k, v = k.to(tl.float32), v.to(tl.float32)
        score = tl.dot(q, k, input_precision="ieee") * SCALING
        if SOFTCAP != 0.0:
            score = tanh(score / SOFTCAP) * SOFTCAP
        seen = inside[None, :] & (position[None, :] >= lows[:, None])
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(high, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(score - base[:, None])
        rescale = tl.exp(high - base)
        total = total * rescale + tl.sum(p, 1)
        product = product * rescale[:, None]
        product = tl.dot(p.to(v.dtype), v, product, input_precision="ieee")
        high = higher
    return high, total, product


@triton.jit(
    do_not_specialize=["M", "splits", "pages_width"],
    do_not_specialize_on_alignment=["high_ptr", "total_ptr"],
)
def prompt_kernel(
    query_ptr, keys_ptr, values_ptr, pages_ptr, lengths_ptr, cu_rows_ptr, own_lengths_ptr,
    high_ptr, total_ptr, product_ptr, M, splits, pages_width,
    query_row, query_head, key_page, key_slot, key_head, value_page, value_slot, value_head,
    REP: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, D_VALUE: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PAGE: tl.constexpr, SCALING: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Partial softmaxes over ``SPLIT`` keys of a group's prompt, for its rows in tiles of ``ROWS``
    queries, of which a program takes every ``LANES``-th. high, total, product: ``[splits, M, h]``
    and ``[splits, M, h, D_VALUE]``, by split, row and head. REP: heads that share one of keys.
    WINDOW: 0 for none."""
    program = tl.program_id(0)
    kv = (program % H_KV).to(tl.int64)
    split = (program // H_KV) % splits
    lane = (program // H_KV // splits) % LANES
    group = (program // H_KV // splits // LANES).to(tl.int64)
    first = tl.load(cu_rows_ptr + group).to(tl.int32)
    count = (tl.load(cu_rows_ptr + group + 1).to(tl.int32) - first) * REP
    length = tl.load(lengths_ptr + group).to(tl.int32)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, length)
    dims = tl.arange(0, PAD)
    value_dims = tl.arange(0, PAD_VALUE)
    if start < end:
        for tile in range(lane * ROWS, count, LANES * ROWS):
            index = tile + tl.arange(0, ROWS)
            there = index < count
            row = (first + index // REP).to(tl.int64)
            head = kv * REP + index % REP
            q = tl.load(
                query_ptr + (row * query_row + head * query_head)[:, None] + dims[None, :],
                mask=there[:, None] & (dims < D)[None, :],
                other=0.0,
            )
            if INTERPRET:
                q = q.to(tl.float32)
            lows = tl.zeros([ROWS], tl.int32)
            begin = start
            if WINDOW != 0:
                own = tl.load(own_lengths_ptr + row, mask=there, other=2**30).to(tl.int32)
                lows = tl.maximum(length + own - WINDOW, 0)
                begin += tl.maximum(tl.min(lows, 0) - start, 0) // BLOCK * BLOCK
            high, total, product = _attend(
                q, lows, keys_ptr + kv * key_head, values_ptr + kv * value_head,
                pages_ptr + group * pages_width, begin, end,
                key_page, key_slot, value_page, value_slot,
                D, D_VALUE, PAD, PAD_VALUE, PAGE, SCALING, SOFTCAP, BLOCK, INTERPRET,
            )  # fmt: skip
            place = (split.to(tl.int64) * M + row) * (H_KV * REP) + head
            tl.store(high_ptr + place, high, mask=there)
            tl.store(total_ptr + place, total, mask=there)
            tl.store(
                product_ptr + place[:, None] * D_VALUE + value_dims[None, :],
                product,
                mask=there[:, None] & (value_dims < D_VALUE)[None, :],
            )


@triton.jit(
    do_not_specialize=["M", "splits", "pages_width"],
    do_not_specialize_on_alignment=["high_ptr", "total_ptr"],
)
def own_kernel(
    query_ptr, keys_ptr, values_ptr, pages_ptr, lengths_ptr,
    high_ptr, total_ptr, product_ptr, M, splits, pages_width,
    query_row, query_head, key_page, key_slot, key_head, value_page, value_slot, value_head,
    REP: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, D_VALUE: tl.constexpr,
    PAD: tl.constexpr, PAD_VALUE: tl.constexpr, PAGE: tl.constexpr, SCALING: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Partial softmaxes over ``SPLIT`` own keys of a row, for the REP heads (of ROWS queries) that
    share a head of keys. Arguments as those of ``prompt_kernel``."""
    program = tl.program_id(0)
    kv = (program % H_KV).to(tl.int64)
    split = (program // H_KV) % splits
    row = (program // H_KV // splits).to(tl.int64)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, length)
    low = 0
    if WINDOW != 0:
        low = tl.maximum(length - WINDOW, 0)
    if (start < end) & (low < end):
        dims = tl.arange(0, PAD)
        value_dims = tl.arange(0, PAD_VALUE)
        index = tl.arange(0, ROWS)
        there = index < REP
        head = kv * REP + index
        q = tl.load(
            query_ptr + row * query_row + (head * query_head)[:, None] + dims[None, :],
            mask=there[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        if INTERPRET:
            q = q.to(tl.float32)
        begin = start + tl.maximum(low - start, 0) // BLOCK * BLOCK
        high, total, product = _attend(
            q, tl.zeros([ROWS], tl.int32) + low, keys_ptr + kv * key_head,
            values_ptr + kv * value_head, pages_ptr + row * pages_width, begin, end,
            key_page, key_slot, value_page, value_slot,
            D, D_VALUE, PAD, PAD_VALUE, PAGE, SCALING, SOFTCAP, BLOCK, INTERPRET,
        )  # fmt: skip
        place = (split.to(tl.int64) * M + row) * (H_KV * REP) + head
        tl.store(high_ptr + place, high, mask=there)
        tl.store(total_ptr + place, total, mask=there)
        tl.store(
            product_ptr + place[:, None] * D_VALUE + value_dims[None, :],
            product,
            mask=there[:, None] & (value_dims < D_VALUE)[None, :],
        )


def decode_attention_triton(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt_pages: Tensor,
    prompt_lengths: Tensor,
    cu_rows: Tensor,
    own_pages: Tensor,
    own_lengths: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Arguments as the custom op has checked them."""
    query, keys, values = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values)
    )
    tables = prompt_pages, prompt_lengths, cu_rows, own_pages, own_lengths
    prompt_pages, prompt_lengths, cu_rows, own_pages, own_lengths = (x.contiguous() for x in tables)
    M, h, d = query.shape
    page, h_kv = keys.shape[1:3]
    rep, d_value = h // h_kv, values.shape[-1]
    prompt_splits, own_splits = (
        triton.cdiv(table.shape[1] * page, DECODE_SPLIT) for table in (prompt_pages, own_pages)
    )
    splits = prompt_splits + own_splits
    high, total = query.new_empty(2, splits, M, h, dtype=torch.float32)
    product = query.new_empty(splits, M, h, d_value, dtype=torch.float32)
    # The larger blocks do not fit the registers of AMD's.
    aligned = not host.is_amd() and all(map(_is_aligned, (query, keys, values)))
    turing, size = is_turing(query.device), query.element_size()
    of_prompt, of_own = (
        decode_launch(max(d, d_value), size, prompt=prompt, aligned=aligned, turing=turing)
        for prompt in (True, False)
    )
    common: dict[str, Any] = {
        **constants(d, d_value, rep, h_kv, page),
        "SCALING": scaling,
        "SOFTCAP": softcap or 0.0,
        "WINDOW": window or 0,
        "INTERPRET": interpreted(),
    }
    strides = (*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3])
    if grid := len(prompt_lengths) * DECODE_LANES * prompt_splits * h_kv:
        prompt_kernel[(grid,)](
            query, keys, values, prompt_pages, prompt_lengths, cu_rows, own_lengths,
            high, total, product, M, prompt_splits, prompt_pages.shape[1], *strides,
            ROWS=decode_rows(size, max(d, d_value)), LANES=DECODE_LANES, **common,
            BLOCK=of_prompt.block, **of_prompt.options(),
        )  # fmt: skip
    own_parts = (x[prompt_splits:] for x in (high, total, product))
    own_kernel[(M * own_splits * h_kv,)](
        query, keys, values, own_pages, own_lengths,
        *own_parts, M, own_splits, own_pages.shape[1], *strides,
        ROWS=max(power_of_two(rep), 16), **common, BLOCK=of_own.block, **of_own.options(),
    )  # fmt: skip
    # The interpreter does not round to bfloat16, it cuts.
    out = values.new_empty(M, h, d_value, dtype=torch.float32 if interpreted() else None)
    merge = decode_merge_launch()
    merge_kernel[(M * h,)](
        out, high, total, product, prompt_lengths, cu_rows, own_lengths,
        M, len(prompt_lengths), prompt_splits,
        H=h, D=d_value, PAD=power_of_two(d_value), WINDOW=window or 0, SPLIT=DECODE_SPLIT,
        BLOCK=merge.block, **merge.options(),
    )  # fmt: skip
    return out.to(values.dtype)


def _is_aligned(x: Tensor) -> bool:
    """An allocation is; what lies in it may not be."""
    return all(n % 16 == 0 for n in (x.storage_offset(), *x.stride()[:-1]))


def constants(d: int, d_value: int, rep: int, h_kv: int, page: int) -> dict[str, int]:
    """Constants of a model's shapes; dimensions are padded to what ``tl.dot`` takes."""
    return {
        "REP": rep,
        "H_KV": h_kv,
        "D": d,
        "D_VALUE": d_value,
        "PAD": max(power_of_two(d), 16),
        "PAD_VALUE": max(power_of_two(d_value), 16),
        "PAGE": page,
        "SPLIT": DECODE_SPLIT,
    }
