"""How samples are cut into micro-batches under a budget of tokens. Pure functions.

The loss is a sum over tokens with a denominator known before, so the cut changes the order of sums,
nothing else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from fusedgrpo.models.packed_batch import Ids, Layout, Pair

# Whatever is given or scored, all of a completion is forwarded.
Pairs = Sequence[tuple[Ids, Ids] | Pair]


class _Part(NamedTuple):
    """Samples that stay together, and the tokens they take."""

    tokens: int
    members: list[int]


def micro_batches(
    pairs: Pairs, max_tokens: int, layout: Layout, *, whole: bool = False
) -> list[list[int]]:
    """Indices of ``pairs`` in batches of at most ``max_tokens`` tokens as forwarded in ``layout``,
    or of a single pair where it alone has more.

    ``"shared"``: completions of one prompt stay together, a prompt counts once per batch. A group
    that is too large is split by completions, its prompt repeated once per part. ``"rows"``:
    padding counts. whole: last tokens are forwarded too. The largest batch comes first: what does
    not fit into memory fails there.
    """
    if layout == "rows":
        return _rows(pairs, max_tokens, whole)
    batches: list[_Part] = []
    for part in sorted(_parts(pairs, max_tokens, layout, whole), key=lambda part: -part.tokens):
        for i, batch in enumerate(batches):
            if batch.tokens + part.tokens <= max_tokens:
                batches[i] = _Part(batch.tokens + part.tokens, batch.members + part.members)
                break
        else:
            batches.append(part)
    batches.sort(key=lambda batch: -batch.tokens)
    return [sorted(batch.members) for batch in batches]


def longest(pairs: Pairs, *, whole: bool = False) -> int:
    """Tokens of the largest batch that cannot be cut: a single pair."""
    return max((len(p) + _forwarded(c, whole) for p, c, *_ in pairs), default=0)


def shares(pairs: Pairs, count: int) -> list[range]:
    """``pairs`` cut into ``count`` runs of about the same number of tokens, some perhaps empty.

    Prompts count as shared evenly by their completions; one that is cut is forwarded twice.
    """
    copies: dict[tuple[int, ...], int] = {}
    for prompt, *_ in pairs:
        copies[tuple(prompt)] = copies.get(tuple(prompt), 0) + 1
    tokens = [len(c) + len(p) / copies[tuple(p)] for p, c, *_ in pairs]
    total = math.fsum(tokens)
    sizes = [0] * count
    before = 0.0
    for own in tokens:
        sizes[min(int(count * (before + own / 2) / total), count - 1)] += 1
        before += own
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def forwarded_tokens(pairs: Pairs, layout: Layout, *, whole: bool = False) -> int:
    """Tokens that one batch of ``pairs`` puts through the model, padding included."""
    if layout == "rows":
        return len(pairs) * longest(pairs, whole=whole)
    prompts = {tuple(p) for p, *_ in pairs} if layout == "shared" else [p for p, *_ in pairs]
    return sum(map(len, prompts)) + sum(_forwarded(c, whole) for _, c, *_ in pairs)


def _forwarded(completion: Ids, whole: bool) -> int:
    """A completion's last token predicts nothing, and stays outside unless all are asked for."""
    return len(completion) if whole else max(len(completion) - 1, 0)


def _parts(pairs: Pairs, max_tokens: int, layout: Layout, whole: bool) -> list[_Part]:
    """Groups of one prompt, cut where they exceed the budget; single pairs if none is shared."""
    if layout == "packed":
        return [_Part(len(p) + _forwarded(c, whole), [i]) for i, (p, c, *_) in enumerate(pairs)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, *_) in enumerate(pairs):
        groups.setdefault(tuple(prompt), []).append(i)
    parts: list[_Part] = []
    for prompt, members in groups.items():
        open_part: _Part | None = None
        for i in sorted(members, key=lambda i: -len(pairs[i][1])):
            own = _forwarded(pairs[i][1], whole)
            if open_part is not None and open_part.tokens + own <= max_tokens:
                open_part = _Part(open_part.tokens + own, [*open_part.members, i])
            else:
                if open_part is not None:
                    parts.append(open_part)
                open_part = _Part(len(prompt) + own, [i])
        assert open_part is not None
        parts.append(open_part)
    return parts


def _rows(pairs: Pairs, max_tokens: int, whole: bool) -> list[list[int]]:
    """Longest first, so that rows of one batch are nearly alike."""
    lengths = [len(prompt) + _forwarded(completion, whole) for prompt, completion, *_ in pairs]
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * width <= max_tokens:
            batches[-1].append(index)
        else:
            width = lengths[index]
            batches.append([index])
    return batches
