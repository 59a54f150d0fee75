"""Which adapted layers of a model are given the same input: found by watching forward passes.

Query, key and value projections read one tensor, and so do the two first halves of a gated MLP. An
architecture does not say so anywhere, and does not have to: whoever reads the same tensor object
one after the other, shares it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

Forward = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def forwards(layers: Sequence[nn.Module], each: Sequence[Forward]) -> Iterator[None]:
    """Inside, ``layers`` have these forwards, and afterwards what they had before. Hooks on the
    layers run as ever."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer, forward in zip(layers, each, strict=True):
        layer.forward = forward  # on the instance: the class keeps its own
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


class Watch:
    """Notes the inputs of ``layers`` in forward passes inside ``watching``."""

    def __init__(self, layers: Sequence[Any]):
        self.layers = layers
        self._families: list[list[int]] = []
        self._source: Tensor | None = None
        self._seen: set[int] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with forwards(self.layers, [self._noting(i) for i in range(len(self.layers))]):
            yield
        self._source = None

    def families(self) -> list[list[int]]:
        """Indices of ``layers``, those that share an input together; one that was never called,
        such as an expert that no token was sent to, alone."""
        alone = [[i] for i in range(len(self.layers)) if i not in self._seen]
        return self._families + alone

    def _noting(self, index: int) -> Forward:
        own = self.layers[index].forward

        def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
            if index not in self._seen:
                self._seen.add(index)
                if x is not self._source:
                    self._families.append([])
                self._families[-1].append(index)
            self._source = x
            return own(x, *args, **options)

        return forward
