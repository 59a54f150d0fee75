"""Frozen weights rest in the dtype that autocast would cast them to in each forward pass.

Autocast keeps its casts of weights that train, and makes all others anew for every product. A
linear layer whose weight is there in that dtype gives the same bits without them, from half the
memory, as long as nothing but the product sees it: whether something does is asked of the model on
a few tokens (docs/decisions/0012-weights-at-rest.md).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fusedgrpo.models.adapters.attached import Adapters, adapter_layers, has_adapters, unwrapped
from fusedgrpo.models.head import head_layer

log = logging.getLogger("fusedgrpo")


@contextlib.contextmanager
def at_rest_after(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """To be entered around a pass of a few tokens, under autocast to ``dtype``, in which a model
    that has its adapters runs as it will. Linear layers that only gave their product then rest in
    ``dtype``, and so does the head. None: nothing is cast."""
    if dtype is None:
        yield
        return
    layers = frozen_linear(model)
    head = head_layer(unwrapped(model))
    with _watched([layer for layer in layers if layer is not head], dtype) as uses:
        yield
    chosen = [layer for layer in layers if layer in uses.plain]
    # How the head is used is known (head.py, linear_logprob), unless it goes into the checkpoints.
    if head in layers and not Adapters(model).saves_embeddings:
        chosen.append(head)
    saved = store(chosen, head, dtype)
    if saved:
        log.info(
            "%d frozen linear layers in float32 now rest in %s, which they compute in (%.1f MiB "
            "less, the same results). dtype: float32 keeps them, as for a merge after the run.",
            len(chosen),
            str(dtype).removeprefix("torch."),
            saved / 2**20,
        )


def frozen_linear(model: nn.Module) -> list[nn.Linear]:
    """The linear layers in float32 that do not train, as far as they are plain: not of an adapter,
    no copy or original of what an adapter trains whole, their weights in no other kind of module
    (a head that is tied to the embeddings)."""
    apart = _of_adapters(model)
    plain = [
        module
        for module in model.modules()
        # Who has a forward of his own, such as accelerate's, does something else beside it.
        if type(module) is nn.Linear and module not in apart and "forward" not in vars(module)
    ]
    others = set(model.modules()) - set(plain)
    shared = {id(p) for module in others for p in module.parameters(recurse=False)}
    return [layer for layer in plain if id(layer.weight) not in shared and _frozen(layer.weight)]


class _Uses:
    """How linear layers were used. called: under autocast to the dtype in question, as a layer is.
    otherwise: called without it, or with a weight that something else has asked for."""

    def __init__(self) -> None:
        self.called: set[nn.Module] = set()
        self.otherwise: set[nn.Module] = set()

    @property
    def plain(self) -> set[nn.Module]:
        """The layers that would give the same bits with weights of that dtype."""
        return self.called - self.otherwise


@contextlib.contextmanager
def _watched(layers: Iterable[nn.Linear], dtype: torch.dtype | None) -> Iterator[_Uses]:
    """Inside, it is noted how ``layers`` are used; ``dtype``: of autocast."""
    uses = _Uses()

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            kind = x.device.type
            cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == dtype
            (uses.called if cast else uses.otherwise).add(self)
            own: Any = self._parameters
            return nn.functional.linear(x, own["weight"], own["bias"])

        def __getattr__(self, name: str) -> Any:  # parameters are asked for here
            if name in ("weight", "bias"):
                uses.otherwise.add(self)
            return super().__getattr__(name)

    layers = list(layers)
    for layer in layers:
        layer.__class__ = Watched
    try:
        yield uses
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def store(layers: Iterable[nn.Linear], head: nn.Module, dtype: torch.dtype) -> int:
    """Cast frozen weights and biases of ``layers`` in place, one by one. Returns the bytes that
    this saved."""
    saved = 0
    for layer in layers:
        # The log-prob operation adds the head's bias in float32.
        for parameter in (layer.weight, None if layer is head else layer.bias):
            if parameter is not None and _frozen(parameter):
                before = parameter.nbytes
                parameter.data = parameter.data.to(dtype)
                saved += before - parameter.nbytes
    return saved


def store_in_float16(model: nn.Module) -> None:
    """Autocast to float16 refuses operations on two bfloat16 tensors, which is what the layers of a
    4-bit model return that has bfloat16 embeddings. What trains, in adapters, stays as it is."""
    frozen = [p for p in model.parameters() if not hasattr(p, "quant_state")]
    if has_adapters(model):
        frozen = [p for p in frozen if not p.requires_grad]
    for tensor in (*frozen, *model.buffers()):
        if tensor.dtype == torch.bfloat16:
            tensor.data = tensor.data.half()


def say_what_is_cast(model: nn.Module, dtype: torch.dtype) -> None:
    """For a model whose weights are not ours to cast."""
    count = sum(layer.weight.numel() for layer in frozen_linear(model))
    if count:
        name = str(dtype).removeprefix("torch.")
        log.info(
            "The model was given in float32, and stays in it: %.1f million frozen weights are "
            "cast to %s in each forward pass. By its name it would be loaded to rest in %s.",
            count / 1e6,
            name,
            name,
        )


def _frozen(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32 and not parameter.requires_grad


def _of_adapters(model: nn.Module) -> set[nn.Module]:
    """Modules of adapters, and all that is below a wrapper of a module that is trained whole or by
    tokens: its original is what the reference and the next such copy begin with."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: set[nn.Module] = set()
    bases: set[nn.Module] = set()
    wrapped: set[nn.Module] = set()
    for layer in adapter_layers(model):
        below = set(layer.modules())
        if isinstance(layer, BaseTunerLayer):
            found |= below
            bases |= set(layer.get_base_layer().modules())
        else:
            wrapped |= below
    return (found - bases) | wrapped
