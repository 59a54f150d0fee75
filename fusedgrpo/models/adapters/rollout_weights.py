"""Layers with LoRA as sampling computes them: what is computed once from the trained weights.

``AdapterWeights`` computes ``W x + (s B)(A x)`` with A of all layers that share x in one product,
and A and s B in the dtype that is computed in: peft casts, multiplies by the scaling and adds for
each layer and token anew. ``MergedWeights`` (merged_weights.py) computes ``(W + s B A) x`` from a
copy of the weights, those of the layers that share x in one product.

Both are other roundings of the same policy. Trained weights and the base, 4-bit ones above all, are
read and never changed. Layers that are no plain LoRA on a linear layer (DoRA and other variants, a
trained bias, conv) keep peft's own forward, and so does whatever has none of it.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedgrpo.models.adapters.few_rows import product
from fusedgrpo.models.adapters.plain_lora import Adapted, factors, plain_layers
from fusedgrpo.models.adapters.shared_inputs import Forward, Watch, forwards


class RolloutWeights(abc.ABC):
    """The forward passes of a policy's adapted layers while it samples.

    learn: to be entered around a first forward pass. active: around those that sample; what
    depends on the trained weights is computed anew where they have changed since. changed: they
    have.
    """

    def __init__(self, policy: Adapted):
        self.policy = policy
        self.layers = plain_layers(policy)
        self._families: list[Family] = []
        self._forwards: list[Forward] = []
        self._computed_from: Any = None

    @contextlib.contextmanager
    def learn(self) -> Iterator[None]:
        watch = Watch(self.layers)
        with watch.watching():
            yield
        self._families = []
        found: dict[int, Forward] = {}
        for indices in watch.families():
            family = self._family([self.layers[i] for i in indices])
            self._families.append(family)
            found |= dict(zip(indices, family.forwards(), strict=True))
        self._forwards = [found[i] for i in range(len(self.layers))]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        state = self._trained_state()
        if state != self._computed_from:
            with torch.no_grad():
                for family in self._families:
                    family.compute()
            self._computed_from = state
        try:
            with forwards(self.layers, self._forwards):
                yield
        finally:
            for family in self._families:
                family.forget()

    def changed(self) -> None:
        self._computed_from = None

    @property
    def bytes(self) -> int:
        """The size of what is kept between rollouts."""
        return sum(x.nbytes for family in self._families for x in family.tensors())

    @abc.abstractmethod
    def _family(self, layers: list[Any]) -> Family:
        """How ``layers`` compute, which have the same input."""

    def _trained_state(self) -> Any:
        """Changes with every optimizer step, also where nobody says so."""
        versions = tuple((p.data_ptr(), p._version) for _, p in self.policy.trainable())
        return self.policy.dtype, versions


class Family(abc.ABC):
    """Layers with one input. The input is looked at again at each call: should it be another one,
    it is computed for that one, so that only speed depends on what was seen before.

    kept: what is computed from the trained weights.
    """

    kept: Tensor | None = None

    def __init__(self, layers: list[Any]):
        self.layers = layers
        self._source: Tensor | None = None
        self._left = 0

    def forwards(self) -> list[Forward]:
        return [self._forward(i) for i in range(len(self.layers))]

    def forget(self) -> None:
        """Let go of the last input and of what was computed of it."""
        self._source = None

    def _share(self, x: Tensor) -> bool:
        """Whether ``x`` is new; the last of the layers to have it lets it go."""
        new = x is not self._source
        if new:
            self._source, self._left = x, len(self.layers)
        self._left -= 1
        return new

    @abc.abstractmethod
    def compute(self) -> None:
        """From the trained weights as they are now, in place where it was done before: addresses
        are in CUDA graphs."""

    @abc.abstractmethod
    def _forward(self, index: int) -> Forward:
        """The forward pass of one of the layers."""

    def tensors(self) -> list[Tensor]:
        """All that was computed from the trained weights."""
        return [] if self.kept is None else [self.kept]

    def _keep(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        kept = self.kept
        if kept is None or kept.dtype != dtype:
            device = self.layers[0].get_base_layer().weight.device
            kept = self.kept = torch.empty(rows, columns, dtype=dtype, device=device)
        return kept


class AdapterWeights(RolloutWeights):
    """``W x + (s B)(A x)``."""

    def _family(self, layers: list[Any]) -> Family:
        return _AdapterFamily(layers, self.policy)


class _AdapterFamily(Family):
    def __init__(self, layers: list[Any], policy: Adapted):
        super().__init__(layers)
        self.policy = policy
        self._ups: list[Tensor] = []
        self._down: Tensor | None = None
        self._input: Tensor | None = None

    def compute(self) -> None:
        dtype = self.policy.dtype
        parts = [list(factors(layer)) for layer in self.layers]
        rank = sum(len(a) for adapters in parts for a, _, _ in adapters)
        kept = self._keep(rank, self.layers[0].in_features, dtype)
        kept.copy_(torch.cat([a for adapters in parts for a, _, _ in adapters]))
        ups = [torch.cat([b * s for _, b, s in adapters], 1).T.to(dtype) for adapters in parts]
        if len(self._ups) == len(ups) and self._ups[0].dtype == dtype:
            for old, new in zip(self._ups, ups, strict=True):
                old.copy_(new)
        else:
            self._ups = [up.contiguous() for up in ups]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self._ups]

    def forget(self) -> None:
        super().forget()
        self._down = self._input = None

    def _forward(self, index: int) -> Forward:
        base = self.layers[index].get_base_layer()
        dense = type(base) is nn.Linear
        ranks = [sum(len(a) for a, _, _ in factors(layer)) for layer in self.layers]
        start = sum(ranks[:index])
        columns = slice(start, start + ranks[index])

        def forward(x: Tensor) -> Tensor:
            if self._share(x):
                assert self.kept is not None
                self._input = x.to(self.kept.dtype)
                self._down = product(self._input, self.kept).flatten(0, -2)
            assert self._down is not None and self._input is not None
            # A quantised layer returns the dtype that it is given.
            x = self._input
            fits = dense and base.weight.dtype == x.dtype
            out: Tensor = product(x, base.weight, base.bias) if fits else base(x)
            down, up = self._down[:, columns], self._ups[index]
            flat = out.view(-1, out.shape[-1])
            if flat.dtype == up.dtype:
                flat.addmm_(down, up)
            else:
                flat += down @ up
            if not self._left:
                self.forget()
            return out

        return forward
