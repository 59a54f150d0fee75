"""Layers with LoRA as sampling computes them: adapters of one input in one product, or no adapters.

``AdapterWeights`` computes ``W x + (s B)(A x)`` with A of all layers that share x in one product,
and A and s B in the dtype that is computed in: peft casts, multiplies by the scaling and adds for
each layer and token anew. ``MergedWeights`` computes ``(W + s B A) x`` from a copy of the weights,
those of the layers that share x in one product.

Both are other roundings of the same policy. Trained weights and the base, 4-bit ones above all, are
read and never changed. Layers that are no plain LoRA on a linear layer (DoRA and other variants, a
trained bias, conv) keep peft's own forward, and so does whatever has none of it.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusedgrpo.models.adapters.attached import adapter_layers
from fusedgrpo.models.adapters.few_rows import product
from fusedgrpo.models.adapters.shared_inputs import Forward, Watch, forwards

# Elements of a copy that are folded at a time: what is computed in float32 for it stays small.
FOLDED = 2**22


class Adapted(Protocol):
    """A policy, as far as it is looked at here. model: with its adapters. dtype: that is computed
    in. device: where."""

    model: Any

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def trainable(self) -> Sequence[tuple[str, Tensor]]: ...


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
        parts = [list(_parts(layer)) for layer in self.layers]
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
        ranks = [sum(len(a) for a, _, _ in _parts(layer)) for layer in self.layers]
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


class MergedWeights(RolloutWeights):
    """``(W + s B A) x``, from a copy of W in the dtype that is computed in."""

    def _family(self, layers: list[Any]) -> Family:
        return _MergedFamily(layers, self.policy)


class _MergedFamily(Family):
    def __init__(self, layers: list[Any], policy: Adapted):
        super().__init__(layers)
        self.policy = policy
        # On a CPU a product of more columns is no faster, rather the contrary.
        self.stacked = policy.device.type != "cpu"
        self._bias: Tensor | None = None
        self._product: Tensor | None = None

    def compute(self) -> None:
        dtype = self.policy.dtype
        sizes = [layer.out_features for layer in self.layers]
        kept = self._keep(sum(sizes), self.layers[0].in_features, dtype)
        for layer, rows in zip(self.layers, kept.split(sizes), strict=True):
            _fold(layer, rows)
        biases = [layer.get_base_layer().bias for layer in self.layers]
        if any(bias is not None for bias in biases):
            none = [kept.new_zeros(size) for size in sizes]
            found = [z if b is None else b.to(dtype) for b, z in zip(biases, none, strict=True)]
            if self._bias is None or self._bias.dtype != dtype:
                self._bias = torch.cat(found)

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *([] if self._bias is None else [self._bias])]

    def forget(self) -> None:
        super().forget()
        self._product = None

    def _forward(self, index: int) -> Forward:
        sizes = [layer.out_features for layer in self.layers]
        columns = slice(sum(sizes[:index]), sum(sizes[: index + 1]))

        def forward(x: Tensor) -> Tensor:
            assert self.kept is not None
            if not self.stacked:
                bias = None if self._bias is None else self._bias[columns]
                return product(x.to(self.kept.dtype), self.kept[columns], bias)
            if self._share(x):
                self._product = product(x.to(self.kept.dtype), self.kept, self._bias)
            assert self._product is not None
            out = self._product[..., columns]
            if not self._left:
                self.forget()
            return out

        return forward


def plain_layers(policy: Adapted) -> list[Any]:
    """The layers of ``policy`` whose active adapters are plain LoRA on a linear layer."""
    return [layer for layer in adapter_layers(policy.model) if _is_plain(layer)]


def all_plain(policy: Adapted) -> bool:
    """Whether every adapter is one that can be folded into a copy of its layer's weight."""
    layers = adapter_layers(policy.model)
    return bool(layers) and all(map(_is_plain, layers))


def _is_plain(layer: Any) -> bool:
    from peft.tuners import lora

    kinds: tuple[type, ...] = (lora.Linear,)
    if hasattr(lora, "Linear4bit"):  # with bitsandbytes alone
        kinds += (lora.Linear4bit,)
    if type(layer) not in kinds or "forward" in vars(layer):  # not what wraps or replaced it
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    return (
        bool(active)
        and not (layer.disable_adapters or layer.merged or layer.fan_in_fan_out)
        and not any(name in layer.lora_variant or layer.lora_bias[name] for name in active)
        and isinstance(base, nn.Linear)
        and layer.base_layer is base
    )


def _parts(layer: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A, B and the scaling of each active adapter."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            yield (
                layer.lora_A[name].weight.detach(),
                layer.lora_B[name].weight.detach(),
                layer.scaling[name],
            )


def _fold(layer: Any, out: Tensor) -> None:
    """``out [out_features, in_features]`` becomes the weight with all active adapters in it, summed
    in float32 and rounded once."""
    weight = _dense(layer.get_base_layer().weight)
    exact = torch.promote_types(weight.dtype, torch.float32)
    step = max(FOLDED // weight.shape[1], 1)
    for lo in range(0, len(weight), step):
        rows = slice(lo, lo + step)
        total = out[rows]
        if total.dtype == exact:
            total.copy_(weight[rows])
        else:
            total = weight[rows].to(exact, copy=True)
        for a, b, scaling in _parts(layer):
            # In place: autocast leaves that alone, and would multiply in 16 bits otherwise.
            total.addmm_(b[rows].to(exact), a.to(exact), alpha=scaling)
        if total.dtype != out.dtype:
            out[rows].copy_(total)
        del total  # or it would be there beside the next one


def _dense(weight: Any) -> Tensor:
    if (state := getattr(weight, "quant_state", None)) is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), state)
