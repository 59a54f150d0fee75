"""Keys and values in pages, as a decode step finds them, with NaN wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paged:
    """Arguments of ``decode_attention``, in its order."""

    query: Tensor
    keys: Tensor
    values: Tensor
    prompt_pages: Tensor
    prompt_lengths: Tensor
    cu_rows: Tensor
    own_pages: Tensor
    own_lengths: Tensor

    def __iter__(self):
        return iter(vars(self).values())

    def to(self, target: torch.dtype | torch.device) -> Paged:
        """On another device, or the floating tensors in another dtype."""
        moved = {
            name: x.to(target)
            for name, x in vars(self).items()
            if isinstance(target, torch.device) or x.is_floating_point()
        }
        return replace(self, **moved)

    def replace(self, **changed: Tensor) -> Paged:
        return replace(self, **changed)

    def rows(self, *wanted: int) -> Paged:
        """These rows without their company; the tables stay as wide as they are."""
        group = [int((self.cu_rows[1:] <= m).sum()) for m in wanted]
        kept = sorted(set(group))
        counts = torch.tensor([0, *(group.count(g) for g in kept)])
        return replace(
            self,
            query=self.query[list(wanted)],
            prompt_pages=self.prompt_pages[kept],
            prompt_lengths=self.prompt_lengths[kept],
            cu_rows=counts.cumsum(0).to(self.cu_rows.dtype),
            own_pages=self.own_pages[list(wanted)],
            own_lengths=self.own_lengths[list(wanted)],
        )


def paged(
    prompts: list[int],
    own: list[list[int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    d_values: int | None = None,
    page: int = 4,
    scattered: bool = True,
    seed: int = 0,
    sharp: float = 1.0,
) -> Paged:
    """Prompts of these lengths and, for each, the lengths of its completions.

    scattered: pages in random order; otherwise each sequence's are consecutive. sharp: factor of
    the queries.
    """
    g = torch.Generator().manual_seed(seed)
    lengths = [n for completions in own for n in completions]
    needed = [-(-n // page) for n in (*prompts, *lengths)]
    total = sum(needed) + 3
    free = torch.randperm(total, generator=g) if scattered else torch.arange(total)
    pools = [torch.full((total, page, kv_heads, width), torch.nan) for width in (d, d_values or d)]
    tables = []
    for n, count in zip((*prompts, *lengths), needed, strict=True):
        pages, free = free[:count], free[count:]
        tables.append(pages.tolist())
        for pool in pools:
            at = pages.repeat_interleave(page)[:n], torch.arange(n) % page
            pool[at] = torch.randn(n, *pool.shape[2:], generator=g)

    def table(rows: list[list[int]]) -> Tensor:
        wide = max(map(len, rows)) + 2
        junk = [-1, 2**31 - 1, -(2**31)]
        return torch.tensor(
            [row + [junk[i % 3] for i in range(wide - len(row))] for row in rows],
            dtype=torch.int32,
        )

    ends = torch.tensor([0, *map(len, own)]).cumsum(0)
    return Paged(
        torch.randn(len(lengths), heads, d, generator=g) * sharp,
        *pools,
        table(tables[: len(prompts)]),
        torch.tensor(prompts, dtype=torch.int32),
        ends.int(),
        table(tables[len(prompts) :]),
        torch.tensor(lengths, dtype=torch.int32),
    )
