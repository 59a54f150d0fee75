"""A copy of the adapted layers' weights with the adapters folded in, to sample from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgrpo.models.adapters.few_rows import product
from fusedgrpo.models.adapters.plain_lora import Adapted, factors
from fusedgrpo.models.adapters.rollout_weights import Family, RolloutWeights
from fusedgrpo.models.adapters.shared_inputs import Forward

# Elements of a copy that are folded at a time: what is computed in float32 for it stays small.
FOLDED = 2**22


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
            fold(layer, rows)
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


def fold(layer: Any, out: Tensor) -> None:
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
        for a, b, scaling in factors(layer):
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
