"""The tokens that take part in a loss, and their cut into chunks of rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Rows ``lo:hi`` of the tokens in use, which belong to completions ``first:last``."""

    lo: int
    hi: int
    first: int
    last: int

    def ends(self, ends: Sequence[int]) -> list[int]:
        """``cu_seqlens`` of the chunk: the completions' boundaries, cut at its own."""
        inside = ends[self.first : self.last + 1]
        return [min(max(end, self.lo), self.hi) - self.lo for end in inside]


def chunks(ends: Sequence[int], R: int, whole: bool) -> Iterator[Chunk]:
    """The tokens in runs of at most R; where ``whole``, of as many whole completions as fit in R,
    and a longer one by itself."""
    N, lo = ends[-1], 0
    while lo < N:
        first = bisect.bisect_right(ends, lo) - 1
        hi = min(lo + R, N)
        if whole and hi < N:
            complete = ends[bisect.bisect_right(ends, hi) - 1]
            hi = complete if complete > lo else ends[first + 1]
        yield Chunk(lo, hi, first, bisect.bisect_left(ends, hi))
        lo = hi


def used_tokens(
    cu_seqlens: Tensor, mask: Tensor | None, sampler_ratio: Tensor | None, like: Tensor
) -> tuple[Tensor, list[int]]:
    """Indices of the tokens that take part, and how many do up to each completion's boundary."""
    N = len(like)
    boundaries = cu_seqlens.tolist()
    if boundaries[0] != 0 or boundaries[-1] != N or boundaries != sorted(boundaries):
        raise ValueError(f"cu_seqlens is {boundaries}: expected to rise from 0 to N={N}.")
    if sampler_ratio is not None:
        finite = sampler_ratio.isfinite()
        mask = finite if mask is None else mask & finite
    if mask is None:
        return torch.arange(N, device=like.device), boundaries
    before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    return mask.nonzero().flatten(), before[cu_seqlens.to(mask.device).long()].tolist()
