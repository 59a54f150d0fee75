"""Which keys the queries of a decode step see: all that depends on tables and lengths alone.

The same for every layer of a model with one window, so it is made once in a step
(``attention_torch.py`` computes with it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Rows share a gather down to this share of the keys of its longest; up to SHORT keys always.
FILLED = 0.75
SHORT = 64
# Bytes of keys that rows are gathered together for: what the cache of a core holds.
GATHERED = 2 * 2**20


class PromptKeys(NamedTuple):
    """Keys of a prompt that the rows ``start .. end`` of its group see.

    pages: their numbers, a slice where they are consecutive. seen: of the keys on these pages.
    hidden: ``[end - start, 1, keys]``, keys before a row's window; None if there are none. The
    window of every row begins after the prompt where ``pages`` is None.
    """

    start: int
    end: int
    pages: slice | Tensor | None
    seen: slice
    hidden: Tensor | None


class OwnKeys(NamedTuple):
    """Own keys of n rows with about as many of them.

    rows: ``[n]``, None for all in order. slots: ``[n * h_kv * most]``, where keys and values of
    each row and head lie in a pool ``[pages * page * h_kv, d]``; a row that has fewer than
    ``most`` repeats its last. hidden: ``[n, 1, 1, most]``, the repeated ones; None if there are
    none.
    """

    rows: Tensor | None
    slots: Tensor
    hidden: Tensor | None


class Row(NamedTuple):
    """The row at ``place`` sees ``seen`` keys of its own, from ``first`` on."""

    place: int
    first: int
    seen: int


@dataclass(frozen=True, slots=True)
class DecodeLayout:
    """prompts: those of groups with rows, in order. own: every row in one of them. back: ``[M]``,
    where in ``own``, end to end, each row is; None if they are in order."""

    prompts: tuple[PromptKeys, ...]
    own: tuple[OwnKeys, ...]
    back: Tensor | None

    @classmethod
    def build(
        cls,
        prompt_pages: Tensor,
        prompt_lengths: Tensor,
        cu_rows: Tensor,
        own_pages: Tensor,
        own_lengths: Tensor,
        *,
        pages: int,
        page: int,
        h_kv: int,
        head_bytes: int,
        window: int | None,
    ) -> DecodeLayout:
        """Tables and lengths as ``decode_attention`` takes them, of a pool of ``pages`` pages with
        ``page`` keys of ``h_kv`` heads, of ``head_bytes`` bytes each. ValueError for lengths that
        the tables do not hold, IndexError for pages of a prompt that are not there."""
        ends, lengths, own = cu_rows.tolist(), prompt_lengths.tolist(), own_lengths.tolist()
        rooms = page * prompt_pages.shape[1], page * own_pages.shape[1]
        _check_lengths(ends, lengths, own, *rooms, len(own_pages))
        prompts = []
        for table, P, start, end in zip(
            prompt_pages.tolist(), lengths, ends[:-1], ends[1:], strict=True
        ):
            if start < end:
                # Where the window of each row begins, counted from the prompt's first key.
                lows = [0 if window is None else max(P + n - window, 0) for n in own[start:end]]
                device = own_pages.device
                prompts.append(_prompt_keys(start, end, table, P, lows, pages, page, device))
        buckets = _bucketed(_rows(own, window), h_kv * head_bytes)
        order = [row.place for bucket in buckets for row in bucket]
        back = None
        if order != sorted(order):
            back = torch.tensor(order).argsort().to(own_pages.device)
        return cls(
            tuple(prompts),
            tuple(_own_keys(bucket, own_pages, page, h_kv) for bucket in buckets),
            back,
        )


def _prompt_keys(
    start: int,
    end: int,
    table: list[int],
    P: int,
    lows: list[int],
    pages: int,
    page: int,
    device: torch.device,
) -> PromptKeys:
    """The prompt of P keys for rows that see them from ``lows`` on."""
    first = min(lows)
    if first >= P:
        return PromptKeys(start, end, None, slice(0), None)
    skipped = first // page
    table = table[skipped : -(-P // page)]
    if min(table) < 0 or max(table) >= pages:
        raise IndexError(f"A prompt has pages {table} of {pages}.")
    hidden = None
    if max(lows) > first:
        hidden = torch.arange(first, P) < torch.tensor(lows)[:, None, None]
    consecutive = table == list(range(table[0], table[0] + len(table)))
    return PromptKeys(
        start,
        end,
        slice(table[0], table[-1] + 1) if consecutive else torch.tensor(table, device=device),
        slice(first - skipped * page, P - skipped * page),
        None if hidden is None else hidden.to(device),
    )


def _rows(lengths: list[int], window: int | None) -> list[Row]:
    rows = []
    for index, n in enumerate(lengths):
        first = 0 if window is None else max(n - window, 0)
        rows.append(Row(index, first, n - first))
    return rows


def _bucketed(rows: list[Row], key_bytes: int) -> list[list[Row]]:
    """Rows with nearly as many keys together, in order, as many as may be gathered at a time."""
    buckets: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -row.seen):
        if buckets:
            most = buckets[-1][0].seen
            alike = most <= SHORT or row.seen >= FILLED * most
            if alike and (len(buckets[-1]) + 1) * most * key_bytes <= GATHERED:
                buckets[-1].append(row)
                continue
        buckets.append([row])
    return [sorted(bucket) for bucket in buckets]


def _own_keys(rows: Sequence[Row], own_pages: Tensor, page: int, h_kv: int) -> OwnKeys:
    device = own_pages.device
    n, most = len(rows), max(row.seen for row in rows)
    # Flat: a tensor of a list of rows takes several times as long.
    numbers = torch.tensor([x for row in rows for x in row], device=device)
    index, first, seen = numbers.view(n, -1).unbind(1)
    at = torch.arange(most, device=device)
    hidden = None
    if any(row.seen < most for row in rows):
        hidden = (at >= seen[:, None])[:, None, None]
    # Never beyond a row's last key: what lies there may be NaN, for which no weight makes up.
    key = first[:, None] + at.clamp(max=seen[:, None] - 1)
    slot = own_pages[index[:, None], key // page].long() * page + key % page
    heads = torch.arange(h_kv, device=device)[:, None]
    everyone = n == len(own_pages)
    slots = (slot[:, None] * h_kv + heads).flatten()
    return OwnKeys(None if everyone else index, slots, hidden)


def _check_lengths(
    ends: list[int], lengths: list[int], own: list[int], prompt_room: int, own_room: int, M: int
) -> None:
    if ends[0] != 0 or ends[-1] != M or ends != sorted(ends):
        raise ValueError(f"cu_rows={ends}: expected to rise from 0 to the {M} queries.")
    if min(lengths) < 0 or max(lengths) > prompt_room:
        raise ValueError(f"prompt_lengths={lengths}: the tables hold 0 to {prompt_room} keys.")
    if min(own) < 1 or max(own) > own_room:
        raise ValueError(f"own_lengths={own}: the tables hold 1 to {own_room} keys of a row.")
