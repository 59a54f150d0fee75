"""``decode_attention`` in torch: the way on a CPU, and what the Triton kernels are compared with.

Two softmaxes per row, over the prompt's keys and over its own, joined at the end. A prompt is a
product of its keys, read where they lie if its pages are consecutive, with the queries of all rows
and repeated heads of its group. Own keys are gathered once, rows with about as many pages together,
whatever their groups.

16-bit inputs are taken to float32 first, which is more exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Rows share a gather down to this share of the pages of its longest; up to SHORT pages always.
FILLED = 0.75
SHORT = 4
# Bytes of keys that rows are gathered together for: what the cache of a core holds.
GATHERED = 2 * 2**20


class Part(NamedTuple):
    """A softmax over some of the keys, by kv head: the maximum ``[h_kv, rows, rep]`` that was
    subtracted, the sum of the exponentials, and their product with the values ``[..., d]``."""

    high: Tensor
    total: Tensor
    product: Tensor


class Row(NamedTuple):
    """Own keys of the row at ``place`` that are seen: ``pages`` of its table from ``first`` on, and
    of their keys those from ``low`` to before ``high``."""

    place: int
    first: int
    pages: int
    low: int
    high: int


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
    M, h, d = query.shape
    page, h_kv = keys.shape[1:3]
    ends, lengths, own = cu_rows.tolist(), prompt_lengths.tolist(), own_lengths.tolist()
    _check_lengths(ends, lengths, own, page * prompt_pages.shape[1], page * own_pages.shape[1], M)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q = query.to(exact).view(M, h_kv, h // h_kv, d).transpose(0, 1) * scaling
    q = q.contiguous()

    prompts = []
    for pages, P, start, end in zip(
        prompt_pages.tolist(), lengths, ends[:-1], ends[1:], strict=True
    ):
        if start < end:
            # Where the window of each row begins, counted from the prompt's first key.
            lows = [0 if window is None else max(P + n - window, 0) for n in own[start:end]]
            prompts.append(_prompt(q[:, start:end], keys, values, pages, P, lows, softcap))
    prompt = Part(*(torch.cat(x, 1) for x in zip(*prompts, strict=True)))

    buckets = _bucketed(_rows(own, window, page), page * h_kv * d * exact.itemsize)
    parts = [_own(q, keys, values, own_pages, bucket, softcap) for bucket in buckets]
    if len(parts) == 1:
        completion = parts[0]
    else:
        order = torch.tensor([row.place for bucket in buckets for row in bucket])
        back = order.argsort().to(q.device)
        completion = Part(
            *(torch.cat(x, 1).index_select(1, back) for x in zip(*parts, strict=True))
        )
    return _joined(prompt, completion).transpose(0, 1).reshape(M, h, -1).to(values.dtype)


def _joined(a: Part, b: Part) -> Tensor:
    """``[h_kv, M, rep, d]``: one softmax over the keys of both."""
    high = torch.maximum(a.high, b.high)
    a_scale, b_scale = (a.high - high).exp_(), (b.high - high).exp_()
    total = a.total * a_scale + b.total * b_scale
    product = a.product.mul_(a_scale[..., None]).addcmul_(b.product, b_scale[..., None])
    return product.div_(total[..., None])


def _prompt(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: list[int],
    P: int,
    lows: list[int],
    softcap: float | None,
) -> Part:
    """``q [h_kv, n, rep, d]`` of one group over the keys of its prompt from ``lows`` on."""
    h_kv, n, rep, d = q.shape
    first = min(lows)
    if first >= P:
        nothing = q.new_zeros(h_kv, n, rep)
        lowest = torch.full_like(nothing, torch.finfo(q.dtype).min)
        return Part(lowest, nothing, q.new_zeros(h_kv, n, rep, values.shape[-1]))
    page = keys.shape[1]
    skipped = first // page
    pages = pages[skipped : -(-P // page)]
    seen = slice(first - skipped * page, P - skipped * page)
    key, value = (_laid_out(x, pages)[seen].transpose(0, 1).to(q.dtype) for x in (keys, values))
    scores = torch.bmm(q.reshape(h_kv, n * rep, d), key.transpose(1, 2)).view(h_kv, n, rep, -1)
    hidden = None
    if max(lows) > first:
        start = torch.tensor(lows, device=q.device)[:, None, None] - first
        hidden = torch.arange(P - first, device=q.device) < start
    high, total = _softmax_(scores, softcap, hidden)
    product = torch.bmm(scores.view(h_kv, n * rep, -1), value)
    return Part(high, total, product.view(h_kv, n, rep, -1))


def _laid_out(x: Tensor, pages: list[int]) -> Tensor:
    """``[keys, h_kv, d]`` of ``x [pages, page, h_kv, d]``: no copy if the pages are consecutive."""
    if min(pages) < 0 or max(pages) >= len(x):
        raise IndexError(f"A prompt has pages {pages} of {len(x)}.")
    first, after = pages[0], pages[0] + len(pages)
    if pages == list(range(first, after)):
        return x[first:after].flatten(0, 1)
    return x.index_select(0, torch.tensor(pages, device=x.device)).flatten(0, 1)


def _rows(lengths: list[int], window: int | None, page: int) -> list[Row]:
    rows = []
    for index, n in enumerate(lengths):
        low = 0 if window is None else max(n - window, 0)
        first = low // page
        skipped = first * page
        rows.append(Row(index, first, -(-n // page) - first, low - skipped, n - skipped))
    return rows


def _bucketed(rows: list[Row], page_bytes: int) -> list[list[Row]]:
    """Rows with nearly as many pages together, in order, as many as may be gathered at a time."""
    buckets: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.pages):
        if buckets:
            most = buckets[-1][0].pages
            alike = most <= SHORT or row.pages >= FILLED * most
            if alike and (len(buckets[-1]) + 1) * most * page_bytes <= GATHERED:
                buckets[-1].append(row)
                continue
        buckets.append([row])
    return [sorted(bucket) for bucket in buckets]


def _own(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    own_pages: Tensor,
    rows: Sequence[Row],
    softcap: float | None,
) -> Part:
    """``rows`` of ``q [h_kv, M, rep, d]`` over their own keys."""
    h_kv, M, rep, _ = q.shape
    n, most, device = len(rows), max(row.pages for row in rows), q.device
    # Flat: a tensor of a list of rows takes several times as long.
    numbers = torch.tensor([x for row in rows for x in row], device=device)
    index, first, pages, low, high = numbers.view(n, -1).unbind(1)
    # Beyond a row's last page that page again, hidden below: what the table has there may be none.
    columns = first[:, None] + torch.arange(most, device=device).clamp(max=pages[:, None] - 1)
    wanted = own_pages[index[:, None], columns].flatten()
    key, value = (
        x.index_select(0, wanted).unflatten(0, (n, most)).flatten(1, 2) for x in (keys, values)
    )
    hidden = None
    least, highest = min(row.low for row in rows), max(row.high for row in rows)
    key, value = key[:, least:highest], value[:, least:highest]
    if any(row.low > least or row.high < highest for row in rows):
        at = torch.arange(least, highest, device=device)
        hidden = (at < low[:, None]) | (at >= high[:, None])
        value.masked_fill_(hidden[..., None, None], 0)  # no weight makes up for a NaN there
        hidden = hidden[:, None]
    key, value = key.to(q.dtype), value.to(q.dtype)
    if n < M:
        q = q.index_select(1, index)
    scores = q.new_empty(h_kv, n, rep, highest - least)
    product = q.new_empty(h_kv, n, rep, value.shape[-1])
    # Keys of a head are no matrix beside those of the next: one head at a time.
    for query, head, out in zip(q, key.permute(2, 0, 3, 1), scores, strict=True):
        torch.bmm(query, head, out=out)
    high, total = _softmax_(scores, softcap, hidden)
    for weights, head, out in zip(scores, value.permute(2, 0, 1, 3), product, strict=True):
        torch.bmm(weights, head, out=out)
    return Part(high, total, product)


def _softmax_(
    scores: Tensor, softcap: float | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Maximum and sum over the last dimension; ``scores`` becomes the exponentials, 0 where
    ``hidden``. A row without any key has the sum 0, and the least maximum there is."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    high = scores.amax(-1).clamp_(min=torch.finfo(scores.dtype).min)
    scores.sub_(high[..., None]).exp_()
    return high, scores.sum(-1)


def _check_lengths(
    ends: list[int], lengths: list[int], own: list[int], prompt_room: int, own_room: int, M: int
) -> None:
    if ends[0] != 0 or ends[-1] != M or ends != sorted(ends):
        raise ValueError(f"cu_rows={ends}: expected to rise from 0 to the {M} queries.")
    if min(lengths) < 0 or max(lengths) > prompt_room:
        raise ValueError(f"prompt_lengths={lengths}: the tables hold 0 to {prompt_room} keys.")
    if min(own) < 1 or max(own) > own_room:
        raise ValueError(f"own_lengths={own}: the tables hold 1 to {own_room} keys of a row.")
