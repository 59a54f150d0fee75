"""The LoRA layers of a model as ``lora_linears`` computes them: in the update, and in every pass
whose log-probs are compared with those of the update.

Layers that share an input compute together. Which ones do is learned once, in a pass with the
adapters switched off: it must not depend on what was trained so far, or a run that is resumed would
round otherwise. The first of them that is called with an input computes for all, and the others
take their result by the identity of that input (docs/decisions/0018-lora-in-one-node.md).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedgrpo.models.adapters.attached import adapter_layers
from fusedgrpo.models.adapters.lora_linears import Factors, LoraLinear, lora_linears
from fusedgrpo.models.adapters.plain_lora import active, acts, is_lora, not_plain
from fusedgrpo.models.adapters.shared_inputs import Forward, Watch, forwards
from fusedgrpo.models.four_bit import compute_dtype, is_dense

log = logging.getLogger("fusedgrpo")


class FusedLora:
    """The forward passes of ``model``'s layers with plain LoRA while ``active``.

    What keeps peft's own is in ``left_to_peft``, and said once.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._layers: list[Any] = []  # with LoRA
        self._families: list[list[Any]] | None = None
        self._on = False
        self._left: dict[str, set[Any]] = {}
        self._said: set[str] = set()

    @property
    def left_to_peft(self) -> dict[str, int]:
        """How many layers with LoRA computed as peft has them the last time, by the reason."""
        return {reason: len(layers) for reason, layers in self._left.items()}

    @property
    def has_learned(self) -> bool:
        return self._families is not None

    @contextlib.contextmanager
    def learn(self) -> Iterator[None]:
        """To be entered around a forward pass of a few tokens, with the adapters switched off."""
        self._layers = [layer for layer in adapter_layers(self.model) if is_lora(layer)]
        layers = [layer for layer in self._layers if not_plain(layer) is None]
        watch = Watch(layers)
        with watch.watching():
            yield
        self._families = [[layers[i] for i in indices] for indices in watch.families()]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """To be entered around forward passes, and around their backward passes where those compute
        layers anew. It asks each layer what it has, so around many passes rather than each; inside
        itself it does nothing."""
        if self._on:
            yield
            return
        assert self._families is not None, "learn comes first"
        self._left = {}
        chosen = set()
        for layer in self._layers:
            if (reason := not_fused(layer)) is None:
                chosen.add(layer)
            else:
                self._leave(layer, reason)
        families = [[layer for layer in family if layer in chosen] for family in self._families]
        groups = [_Group(layers, self._leave) for layers in families if layers]
        each = [forward for group in groups for forward in group.forwards()]
        self._on = True
        try:
            with forwards([layer for group in groups for layer in group.layers], each):
                yield
        finally:
            self._on = False
            self._say()

    def _leave(self, layer: Any, reason: str) -> None:
        self._left.setdefault(reason, set()).add(layer)

    def _say(self) -> None:
        for reason, count in self.left_to_peft.items():
            if reason not in self._said:
                self._said.add(reason)
                log.info("%d layers with LoRA compute as peft has them: %s.", count, reason)


def not_fused(layer: Any) -> str | None:
    """Why the update leaves ``layer``, one with LoRA, to peft; None if it does not."""
    if (reason := not_plain(layer)) is not None:
        return reason
    names = active(layer)
    base = layer.get_base_layer()
    own = [part[name] for name in names for part in (layer.lora_A, layer.lora_B)]
    if not is_dense(base):
        return f"a base layer of the kind {type(base).__name__}"
    if any(type(module) is not nn.Linear for module in own):
        return "factors that are no plain linear layers"
    if any(_is_watched(module) for module in (base, *own)):
        return "hooks on its parts"
    parameters = [p for module in (base, *own) for p in module.parameters()]
    if any(isinstance(p, DTensor) for p in parameters):
        return "sharded weights"
    if any(p.requires_grad for p in base.parameters()):
        return "a base layer that trains (bias)"
    drops = [layer.lora_dropout[name] for name in names]
    if any(module.training and getattr(module, "p", 0) for module in drops):
        return "dropout in the adapter (lora_dropout)"
    return None


def _is_watched(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)


class _Group:
    """Layers that are given one input. leave: is told which of them computed as peft has it after
    all, and why."""

    def __init__(self, layers: list[Any], leave: Callable[[Any, str], None]):
        self.layers = layers
        self.leave = leave
        self._x: Tensor | None = None
        self._asked: tuple[Any, ...] = ()
        self._waiting: dict[int, Tensor] = {}

    def forwards(self) -> list[Forward]:
        return [self._forward(index) for index in range(len(self.layers))]

    def _forward(self, index: int) -> Forward:
        layer = self.layers[index]
        own = layer.forward

        def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
            dtype = None if args or options else computes_in(layer, x)
            if dtype is None:
                if acts(layer):
                    self.leave(layer, "dtypes or arguments that peft has rules for")
                peft: Tensor = own(x, *args, **options)
                return peft
            if index not in self._waiting or x is not self._x or self._asked != _asked(x, dtype):
                self._compute(x, dtype)
            out = self._waiting.pop(index)
            if not self._waiting:
                self._forget()
            return out

        return forward

    def _compute(self, x: Tensor, dtype: torch.dtype) -> None:
        self._forget()  # what nobody came for
        indices = range(len(self.layers))
        members = [i for i in indices if computes_in(self.layers[i], x) == dtype]
        found = lora_linears(x, [_parts(self.layers[i]) for i in members], dtype)
        self._x, self._asked = x, _asked(x, dtype)
        self._waiting = dict(zip(members, found, strict=True))

    def _forget(self) -> None:
        self._x, self._asked, self._waiting = None, (), {}


def _asked(x: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """All else that a result for ``x`` depends on: its values, the precision, and whether it is to
    have a gradient."""
    version = None if x.is_inference() else x._version
    return version, dtype, torch.is_grad_enabled()


def _parts(layer: Any) -> LoraLinear:
    adapters = [
        Factors(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in active(layer)
    ]
    return LoraLinear(layer.get_base_layer(), adapters)


def computes_in(layer: Any, x: Tensor) -> torch.dtype | None:
    """The one dtype in which ``layer`` multiplies ``x``; None where there are several, or no
    adapter acts."""
    if not acts(layer):
        return None
    base = layer.get_base_layer()
    weights = [part[name].weight for name in active(layer) for part in (layer.lora_A, layer.lora_B)]
    if type(base) is nn.Linear:
        weights.append(base.weight)
    dtypes = {x.dtype, *(weight.dtype for weight in weights)}
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        dtypes -= {torch.float32}  # which is cast
    else:
        dtype = x.dtype
    return dtype if dtypes <= {dtype} and compute_dtype(base) in (None, dtype) else None
