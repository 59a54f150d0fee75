"""Plain LoRA on linear layers: what sampling and the update compute in ways of their own.

Layers that are no plain LoRA (DoRA and other variants, a trained bias, conv) keep peft's forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fusedgrpo.models.adapters.attached import adapter_layers


class Adapted(Protocol):
    """A policy, as far as it is looked at here. model: with its adapters. dtype: that is computed
    in. device: where."""

    model: Any

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def trainable(self) -> Sequence[tuple[str, Tensor]]: ...


def plain_layers(policy: Adapted) -> list[Any]:
    """The layers of ``policy`` whose active adapters are plain LoRA on a linear layer."""
    return [layer for layer in adapter_layers(policy.model) if _is_plain(layer)]


def all_plain(policy: Adapted) -> bool:
    """Whether every adapter is one that can be folded into a copy of its layer's weight."""
    layers = adapter_layers(policy.model)
    return bool(layers) and all(map(_is_plain, layers))


def _is_plain(layer: Any) -> bool:
    return is_lora(layer) and acts(layer) and not_plain(layer) is None


def is_lora(layer: Any) -> bool:
    """Whether it is a layer with LoRA of whatever kind."""
    from peft.tuners.lora import LoraLayer

    return isinstance(layer, LoraLayer)


def acts(layer: Any) -> bool:
    """Whether an adapter of ``layer`` takes part in its forward pass, beside the base's weight."""
    return bool(active(layer)) and not (layer.disable_adapters or layer.merged)


def active(layer: Any) -> list[str]:
    """Names of the adapters that are switched on and that ``layer`` has, in the order of peft."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def not_plain(layer: Any) -> str | None:
    """Why ``layer``, one with LoRA, is not ``W x + b + s B A x``; None if it is."""
    from peft.tuners import lora

    kinds: tuple[type, ...] = (lora.Linear,)
    if hasattr(lora, "Linear4bit"):  # with bitsandbytes alone
        kinds += (lora.Linear4bit,)
    if type(layer) not in kinds:
        return f"LoRA of the kind {type(layer).__module__}.{type(layer).__name__}"
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or layer.base_layer is not base:
        return f"LoRA on a layer of the kind {type(layer.base_layer).__name__}"
    if "forward" in vars(layer):
        return "a forward pass that somebody has put in its place"
    names = active(layer)
    if variants := {type(layer.lora_variant[n]).__name__ for n in names if n in layer.lora_variant}:
        return f"a variant of LoRA ({', '.join(sorted(variants))})"
    if any(layer.lora_bias[name] for name in names):
        return "a bias in the adapter (lora_bias)"
    return "weights that lie transposed (fan_in_fan_out)" if layer.fan_in_fan_out else None


def factors(layer: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A, B and the scaling of each active adapter."""
    for name in active(layer):
        yield (
            layer.lora_A[name].weight.detach(),
            layer.lora_B[name].weight.detach(),
            layer.scaling[name],
        )
