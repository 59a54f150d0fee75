"""Attention over ragged sequences, ``torch.nn.attention.varlen``: flash-attn's, in plain torch.

Shapes: T_q queries and T_k keys of all sequences end to end, h query heads, h_kv of keys, d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


def attention(op: str, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """An operator of ``torch_attn``. given: the arguments by their names in the schema."""
    if op == "_varlen_attn":
        return _forward(given)
    if op == "_varlen_attn_backward":
        return _backward(given)
    raise NotImplementedError(f"torch_attn::{op} on the CUDA twin")


class _Sequence(NamedTuple):
    """One sequence, in float32. keys, values: ``[h, n_k, d]``, repeated for the heads that share
    them."""

    rows: slice
    key_rows: slice
    queries: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor  # [h, n_q, n_k]


def _forward(given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    query = given["query"]
    _check(given)
    out = torch.empty_like(query)
    for one in _sequences(given):
        out[one.rows] = (one.weights @ one.values).transpose(0, 1).to(out.dtype)
    lse = torch.zeros(query.shape[1], len(query))  # the backward here does without
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def _backward(given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    _check(given)
    query, key, value, grad = (given[name] for name in ("query", "key", "value", "grad_out"))
    grads = [torch.zeros(x.shape) for x in (query, key, value)]
    scale = _scale(given)
    for one in _sequences(given):
        d_out = grad[one.rows].float().transpose(0, 1)
        d_weights = d_out @ one.values.transpose(1, 2)
        within = (d_weights * one.weights).sum(-1, keepdim=True)
        d_scores = one.weights * (d_weights - within) * scale
        grads[0][one.rows] = (d_scores @ one.keys).transpose(0, 1)
        grads[1][one.key_rows] = _shared(d_scores.transpose(1, 2) @ one.queries, key)
        grads[2][one.key_rows] = _shared(one.weights.transpose(1, 2) @ d_out, value)
    return tuple(g.to(query.dtype) for g in grads)


def _shared(grad: Tensor, of: Tensor) -> Tensor:
    """``[n_k, h_kv, d]`` of ``[h, n_k, d]``: the sum over the heads that share one of ``of``."""
    return grad.unflatten(0, (of.shape[1], -1)).sum(1).transpose(0, 1)


def _sequences(given: Mapping[str, Any]) -> Iterator[_Sequence]:
    query, key, value = given["query"], given["key"], given["value"]
    repeats = query.shape[1] // key.shape[1]
    q_ends, k_ends = given["cu_seq_q"].tolist(), given["cu_seq_k"].tolist()
    for i in range(len(q_ends) - 1):
        rows, key_rows = slice(*q_ends[i : i + 2]), slice(*k_ends[i : i + 2])
        q, k, v = (x.float().transpose(0, 1) for x in (query[rows], key[key_rows], value[key_rows]))
        k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
        scores = q @ k.transpose(1, 2) * _scale(given)
        seen = _seen(q.shape[1], k.shape[1], given)
        yield _Sequence(rows, key_rows, q, k, v, scores.masked_fill(~seen, -torch.inf).softmax(-1))


def _seen(n_q: int, n_k: int, given: Mapping[str, Any]) -> Tensor:
    """``[n_q, n_k]`` bool. The last query is at the last key's place."""
    left, right = given.get("window_size") or (-1, -1)
    if given["is_causal"]:
        right = 0
    behind = torch.arange(n_q)[:, None] + (n_k - n_q) - torch.arange(n_k)
    seen = torch.ones(n_q, n_k, dtype=torch.bool)
    if right >= 0:
        seen &= behind >= -right
    if left >= 0:
        seen &= behind <= left
    return seen


def _scale(given: Mapping[str, Any]) -> float:
    scale = given.get("scale")
    return given["query"].shape[-1] ** -0.5 if scale is None else scale


def _check(given: Mapping[str, Any]) -> None:
    """What the kernel asks of its arguments, or takes on trust and would read past the end by."""
    query, key, value = given["query"], given["key"], given["value"]
    cu_q, cu_k = given["cu_seq_q"], given["cu_seq_k"]
    dtypes = {query.dtype, key.dtype, value.dtype}
    lengths_q, lengths_k = cu_q.diff(), cu_k.diff()
    asked = {
        "one dtype of 16 bits": len(dtypes) == 1 and query.dtype in (torch.float16, torch.bfloat16),
        "cu_seq of int32": cu_q.dtype == cu_k.dtype == torch.int32,
        "cu_seq contiguous": cu_q.is_contiguous() and cu_k.is_contiguous(),
        "a last dimension of stride 1": all(x.stride(-1) == 1 for x in (query, key, value)),
        "a head dimension that is a multiple of 8, up to 256": query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256,
        "as many keys as values, of one head dimension": key.shape == value.shape
        and key.shape[-1] == query.shape[-1],
        "heads that are a multiple of the keys'": query.shape[1] % key.shape[1] == 0,
        "cu_seq from 0 to the number of tokens": cu_q[0] == cu_k[0] == 0
        and cu_q[-1] == len(query)
        and cu_k[-1] == len(key),
        "max_q and max_k that no sequence exceeds": int(lengths_q.max()) <= given["max_q"]
        and int(lengths_k.max()) <= given["max_k"],
        "keys for every query": bool((lengths_k >= lengths_q).all()),
    }
    for what, met in asked.items():
        if not met:
            raise RuntimeError(f"varlen attention wants {what}")
    if given.get("seqused_k") is not None or given.get("block_table") is not None:
        raise NotImplementedError("varlen attention over pages on the CUDA twin")
