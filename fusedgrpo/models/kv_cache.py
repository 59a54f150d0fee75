"""Keys and values of sequences that are being decoded, in pages.

A prompt's pages exist once for all its completions, and a completion owns the pages of what it has
said, so nothing is padded, copied or grown: memory is that of the tokens there are, rounded up to
pages.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# Tokens of a page. The mean waste is half a page for each completion.
PAGE = 16


def pages_of(tokens: int) -> int:
    """How many pages hold so many tokens."""
    return -(-tokens // PAGE)


class PagedCache:
    """``pages`` pages in each layer, made when a layer first has something to keep.

    Numbers of pages are the same in all layers. The lowest free ones are given out first, so that
    those of a prompt are consecutive while the cache is in order.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages))
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @property
    def free(self) -> int:
        """How many pages nobody owns."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` pages. Raises IndexError where so many are not free."""
        if count > self.free:
            raise IndexError(f"{count} pages, and {self.free} of {self.pages} are free")
        return [heapq.heappop(self._free) for _ in range(count)]

    def give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            heapq.heappush(self._free, page)

    def write(
        self, layer: nn.Module, key: Tensor, value: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keep ``key [T, h_kv, d]`` and ``value`` of a layer at ``slots [T]``; the layer's keys and
        values, ``[pages, PAGE, h_kv, d]`` each."""
        if layer not in self._layers:
            keys, values = (
                torch.empty(self.pages * PAGE, *x.shape[1:], dtype=x.dtype, device=x.device)
                for x in (key, value)
            )
            self._layers[layer] = keys, values
        keys, values = self._layers[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys.unflatten(0, (-1, PAGE)), values.unflatten(0, (-1, PAGE))


def slots_of(pages: Sequence[int], tokens: int) -> list[int]:
    """Where in a layer the first ``tokens`` tokens of these pages are."""
    return [pages[i // PAGE] * PAGE + i % PAGE for i in range(tokens)]
