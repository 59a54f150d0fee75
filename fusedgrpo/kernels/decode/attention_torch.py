"""``decode_attention`` in torch: the way on a CPU, and what the Triton kernels are compared with.

Two softmaxes per row, over the prompt's keys and over its own, joined at the end. A prompt is a
product of its keys, read where they lie if its pages are consecutive, with the queries of all rows
and repeated heads of its group. Own keys are gathered once, head by head, so that those of a row
and a head are a matrix: rows with about as many keys together, whatever their groups.

16-bit inputs are taken to float32 first, which is more exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.decode.layout import DecodeLayout, OwnKeys, PromptKeys


class Part(NamedTuple):
    """A softmax over some of the keys: the maximum ``[rows, h_kv, rep]`` that was subtracted, the
    sum of the exponentials, and their product with the values ``[..., d]``."""

    high: Tensor
    total: Tensor
    product: Tensor


def decode_attention_torch(
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
    """Arguments as the custom op has checked them. ValueError for lengths that the tables do not
    hold, IndexError for pages that are not there."""
    tables = prompt_pages, prompt_lengths, cu_rows, own_pages, own_lengths
    layout = layout_for(keys, *tables, window)
    return attend(layout, query, keys, values, scaling, softcap)


def layout_for(
    keys: Tensor,
    prompt_pages: Tensor,
    prompt_lengths: Tensor,
    cu_rows: Tensor,
    own_pages: Tensor,
    own_lengths: Tensor,
    window: int | None,
) -> DecodeLayout:
    """The layout of a step over a pool of ``keys [pages, page, h_kv, d]``."""
    pages, page, h_kv, d = keys.shape
    return DecodeLayout.build(
        prompt_pages,
        prompt_lengths,
        cu_rows,
        own_pages,
        own_lengths,
        pages=pages,
        page=page,
        h_kv=h_kv,
        head_bytes=d * _exact(keys).itemsize,
        window=window,
    )


def attend(
    layout: DecodeLayout,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """``[M, h, d]`` of ``query [M, h, d]``. IndexError for own pages that are not there."""
    M, h, d = query.shape
    h_kv = keys.shape[2]
    q = (query.to(_exact(query)) * scaling).contiguous().view(M, h_kv, h // h_kv, d)
    prompt = _end_to_end([_prompt(q, keys, values, part, softcap) for part in layout.prompts])
    completion = _end_to_end([_own(q, keys, values, part, softcap) for part in layout.own])
    if layout.back is not None:
        completion = Part(*(x.index_select(0, layout.back) for x in completion))
    return _joined(prompt, completion).reshape(M, h, -1).to(values.dtype)


def _exact(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _end_to_end(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    return Part(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _joined(a: Part, b: Part) -> Tensor:
    """``[M, h_kv, rep, d]``: one softmax over the keys of both."""
    high = torch.maximum(a.high, b.high)
    a_scale, b_scale = (a.high - high).exp_(), (b.high - high).exp_()
    total = a.total * a_scale + b.total * b_scale
    product = (a.product * a_scale[..., None]).addcmul_(b.product, b_scale[..., None])
    return product.div_(total[..., None])


def _prompt(
    q: Tensor, keys: Tensor, values: Tensor, part: PromptKeys, softcap: float | None
) -> Part:
    """The rows of a group, of ``q [M, h_kv, rep, d]``, over the keys of their prompt."""
    q = q[part.start : part.end]
    n, h_kv, rep, d = q.shape
    if part.pages is None:
        nothing = q.new_zeros(n, h_kv, rep)
        lowest = torch.full_like(nothing, torch.finfo(q.dtype).min)
        return Part(lowest, nothing, q.new_zeros(n, h_kv, rep, values.shape[-1]))
    key, value = (
        _laid_out(x, part.pages)[part.seen].transpose(0, 1).to(q.dtype) for x in (keys, values)
    )
    scores = torch.bmm(q.transpose(0, 1).reshape(h_kv, n * rep, d), key.transpose(1, 2))
    high, total = _softmax_(scores.view(h_kv, n, rep, -1), softcap, part.hidden)
    product = torch.bmm(scores, value).view(h_kv, n, rep, -1)
    return Part(*(x.transpose(0, 1) for x in (high, total, product)))


def _laid_out(x: Tensor, pages: slice | Tensor) -> Tensor:
    """``[keys, h_kv, d]`` of ``x [pages, page, h_kv, d]``: no copy if the pages are consecutive."""
    return (x[pages] if isinstance(pages, slice) else x.index_select(0, pages)).flatten(0, 1)


def _own(q: Tensor, keys: Tensor, values: Tensor, part: OwnKeys, softcap: float | None) -> Part:
    """Some rows of ``q [M, h_kv, rep, d]`` over their own keys."""
    if part.rows is not None:
        q = q.index_select(0, part.rows)
    n, h_kv, rep, d = q.shape
    key, value = (
        _gathered(x, part.slots).view(n * h_kv, -1, x.shape[-1]).to(q.dtype) for x in (keys, values)
    )
    scores = torch.bmm(q.view(n * h_kv, rep, d), key.transpose(1, 2))
    high, total = _softmax_(scores.view(n, h_kv, rep, -1), softcap, part.hidden)
    return Part(high, total, torch.bmm(scores, value).view(n, h_kv, rep, -1))


def _gathered(x: Tensor, slots: Tensor) -> Tensor:
    """``[len(slots), d]`` of ``x [pages, page, h_kv, d]``, of any strides."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]).index_select(0, slots)
    _, page, h_kv, _ = x.shape
    return x[slots // (page * h_kv), slots // h_kv % page, slots % h_kv]


def _softmax_(
    scores: Tensor, softcap: float | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maximum and sum over the last dimension; ``scores`` becomes the exponentials, 0 where
    ``hidden``. A row without any key has the sum 0, and the least maximum there is."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    high = scores.amax(-1)
    if hidden is not None:
        high.clamp_(min=torch.finfo(scores.dtype).min)
    scores.sub_(high[..., None]).exp_()
    return high, scores.sum(-1)
