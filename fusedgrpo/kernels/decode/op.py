"""Attention of a decode step: the last token of each live sequence over its keys so far.

Keys and values lie in pages. The pages of a prompt exist once and are read once for all live
completions of its group; a completion has pages of its own. Both parts are softmaxes of their own,
put together by their maxima and sums (the split of FlashDecoding; sharing the prefix as in Juravsky
et al., 2024, arXiv 2402.05099).

Shapes: M live sequences, Gr groups, h query heads, h_kv heads of keys, d head dimension.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.custom_op import plain_arithmetic_on
from fusedgrpo.kernels.decode.attention_torch import decode_attention_torch


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt_pages: Tensor,
    prompt_lengths: Tensor,
    cu_rows: Tensor,
    own_pages: Tensor,
    own_lengths: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``[M, h, d]`` in the dtype of the values, whose d may differ from that of the keys.

    query: ``[M, h, d]``, the last token of each live sequence, rows of a group adjacent: group g is
    rows ``cu_rows[g]:cu_rows[g + 1]`` (``[Gr + 1]``).
    keys, values: ``[pages, page, h_kv, d]``, the layout of flash-attn's block tables; h is a
    multiple of h_kv. The keys and values of the queries' tokens are already there.
    prompt_pages, prompt_lengths: ``[Gr, most]`` pages of each group's prompt in order, and how many
    keys they hold. own_pages, own_lengths: ``[M, most_own]`` and ``[M]``, at least 1, the same of
    each completion, the query's own token counted. Entries of the tables beyond the lengths are not
    read, nor is the rest of a last page. Tables, lengths and ``cu_rows`` are int32 (or int64).

    A row sees the keys of its prompt and then its own, all of them or the last ``window``.
    scaling: of the scores, ``d ** -0.5`` if left out; softcap: ``softcap * tanh(s / softcap)`` of
    the scaled ones.

    The softmax is float32 and products are accumulated in float32 (float64 for float64, by the
    torch backend). A row's result does not depend on the other rows: to rounding in torch, to the
    bit in Triton, whose work is cut by positions alone. No gradient: RuntimeError where one would
    be needed. ValueError or TypeError for what does not fit; lengths and page numbers are checked
    by the torch backend only, since Triton must not wait for the GPU.
    """
    inputs = query, keys, values
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise RuntimeError("decode_attention has no gradient: call it under torch.no_grad().")
    tables = prompt_pages, prompt_lengths, cu_rows, own_pages, own_lengths
    _check(*inputs, *tables)
    if window is not None and window < 1:
        raise ValueError(f"window={window}: a query sees itself, so expected at least 1.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}: expected a positive number, or None.")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not math.isfinite(scaling):
        raise ValueError(f"scaling={scaling}: expected a finite number.")
    return torch.ops.fusedgrpo.decode_attention(
        *inputs, *tables, float(scaling), window, softcap, backend
    )


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt_pages: Tensor,
    prompt_lengths: Tensor,
    cu_rows: Tensor,
    own_pages: Tensor,
    own_lengths: Tensor,
) -> None:
    """Shapes and dtypes."""
    if query.dim() != 3 or keys.dim() != 4 or query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query has shape {tuple(query.shape)} and keys {tuple(keys.shape)}: "
            "expected [M, h, d] and [pages, page, h_kv, d]."
        )
    if values.dim() != 4 or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"keys have shape {tuple(keys.shape)} and values {tuple(values.shape)}: "
            "expected the same pages, page and heads."
        )
    if query.shape[1] % keys.shape[2]:
        raise ValueError(f"{query.shape[1]} heads are no multiple of {keys.shape[2]} of the keys.")
    if not query.dtype == keys.dtype == values.dtype or not query.dtype.is_floating_point:
        raise TypeError(
            f"query is {query.dtype}, keys are {keys.dtype} and values {values.dtype}: "
            "expected one floating dtype."
        )
    M, groups = query.shape[0], prompt_lengths.shape[0]
    for name, table, shape in (
        ("prompt_pages", prompt_pages, (groups, None)),
        ("prompt_lengths", prompt_lengths, (groups,)),
        ("cu_rows", cu_rows, (groups + 1,)),
        ("own_pages", own_pages, (M, None)),
        ("own_lengths", own_lengths, (M,)),
    ):
        fits = table.dim() == len(shape) and table.shape[0] == shape[0]
        if not fits or table.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} has shape {tuple(table.shape)} and dtype {table.dtype}: "
                f"expected {shape[0]} rows of int32, for {M} queries and {groups} groups."
            )


@torch.library.custom_op("fusedgrpo::decode_attention", mutates_args=())
def _decode_attention(
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
    backend: str,
) -> Tensor:
    tables = prompt_pages, prompt_lengths, cu_rows, own_pages, own_lengths
    if query.numel() == 0:
        return values.new_empty(*query.shape[:2], values.shape[-1])
    with plain_arithmetic_on(query):
        if resolve_backend(backend, "decode_attention", query.device, query.dtype) == "triton":
            from fusedgrpo.kernels.decode.attention_triton import decode_attention_triton

            return decode_attention_triton(query, keys, values, *tables, scaling, window, softcap)
        return decode_attention_torch(query, keys, values, *tables, scaling, window, softcap)


@_decode_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(*query.shape[:2], values.shape[-1])
