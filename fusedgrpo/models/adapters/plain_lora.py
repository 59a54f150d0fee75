"""Plain LoRA on linear layers: what sampling computes in ways of its own.

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


def factors(layer: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A, B and the scaling of each active adapter."""
    for name in layer.active_adapters:
        if name in layer.lora_A:
            yield (
                layer.lora_A[name].weight.detach(),
                layer.lora_B[name].weight.detach(),
                layer.scaling[name],
            )
