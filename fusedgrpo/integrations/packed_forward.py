"""A causal LM that scores packed batches inside its own ``forward``.

Trainers hand out models in wrappers (DDP, FSDP, DeepSpeed, peft, autocast) that do their work
around ``forward``, so the packed pass goes through it: ``model(fusedgrpo_packed=(batch, entropy))``
returns log-probs as the real and entropies as the imaginary part of one tensor, and of a mixture of
experts ``RouterSums`` as those of another. So it is with the
LM head: what shards weights gathers them, and takes their gradients, around the ``forward`` of the
module that owns them.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fusedgrpo.errors import ModelError
from fusedgrpo.kernels import linear_logprob
from fusedgrpo.models.packed_batch import Layout, PackedBatch
from fusedgrpo.models.packing_probe import SharedPrompt
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.router import RouterLoss, RouterSums, find_router


class PackedForward:
    """The forward pass that ``install`` leaves on a model as ``fusedgrpo_forward``."""

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        temperature: float,
        shared_prompt: SharedPrompt,
        head_in_float32: bool,
        router_coef: float = 0.0,
    ):
        self._router_coef = router_coef
        self._causal_lm: Any = causal_lm
        self._temperature = temperature
        self._shared_prompt: SharedPrompt = shared_prompt
        self._head_in_float32 = head_in_float32

    @functools.cached_property
    def policy(self) -> Policy:
        # At the first use: sharded weights are not there before the first forward.
        router = None
        if self._router_coef:
            router = probe_router(self._causal_lm, self._router_coef)
        return Policy(
            self._causal_lm,
            compute_dtype="inherit",
            temperature=self._temperature,
            shared_prompt=self._shared_prompt,
            router=router,
        )

    @property
    def layout(self) -> Layout:
        return self.policy.layout

    @property
    def asked(self) -> bool:
        """Whether the layout is known. To find it out runs the model: where weights are sharded,
        through all wrappers, ``model(fusedgrpo_packed="layout")``, in every process."""
        return "policy" in vars(self)

    def logprobs(
        self, packed: PackedBatch, entropy: bool | Literal["detached"]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``[N]`` complex64: log-probs and, if asked for, i times the entropies, in the precision
        that the caller's wrappers have set. With a router, ``[E]`` complex64 as well."""
        routed: list[RouterSums] | None = None if self.policy.router is None else []
        hidden = self.policy.hidden(packed, routed=routed)
        layer: Any = self._causal_lm.get_output_embeddings()
        score = functools.partial(self._score, packed=packed, entropy=entropy)
        with _forward_replaced(layer, score):
            scored: Tensor = layer(hidden)
        if routed is None:
            return scored
        (sums,) = routed
        return scored, torch.complex(sums.probability, sums.chosen.to(sums.probability))

    def _score(
        self, hidden: Tensor, *, packed: PackedBatch, entropy: bool | Literal["detached"]
    ) -> Tensor:
        head = self.policy.head
        weight, device_type = head.weight, hidden.device.type
        if isinstance(weight, DTensor):
            raise ModelError(
                "The LM head is sharded even inside its own forward pass (tensor parallelism?): "
                "expected a whole weight. Use DDP or FSDP, and leave lm_head out of such a plan."
            )
        if self._head_in_float32:
            hidden, weight = hidden.float(), weight.float()
        elif not torch.is_autocast_enabled(device_type):
            hidden = hidden.to(weight.dtype)
        packed.check_targets(len(weight))
        inherited = torch.is_autocast_enabled(device_type) and not self._head_in_float32
        with torch.autocast(device_type, enabled=inherited):
            logp, entropies = linear_logprob(
                hidden.to(weight.device),
                weight,
                packed.targets.to(weight.device),
                bias=head.bias,
                temperature=self._temperature,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                return_entropy=entropy,
                targets_checked=True,
            )
        # Complex: under mixed precision FSDP2 rounds what modules return to 16 bit if it is real.
        return torch.complex(logp, torch.zeros_like(logp) if entropies is None else entropies)


def probe_router(causal_lm: nn.Module, coef: float) -> RouterLoss | None:
    """``find_router`` of a model in any mode."""
    modes = [(module, module.training) for module in causal_lm.modules()]
    causal_lm.eval()
    try:
        return find_router(causal_lm, coef)
    finally:
        for module, training in modes:
            module.training = training


def install(
    causal_lm: nn.Module,
    *,
    temperature: float = 1.0,
    shared_prompt: SharedPrompt = "auto",
    head_in_float32: bool = False,
    router_coef: float = 0.0,
) -> PackedForward:
    """Teach ``causal_lm`` the keyword ``fusedgrpo_packed``; calls without it are what they were."""
    model: Any = causal_lm
    original = model.forward
    packed_forward = PackedForward(
        causal_lm,
        temperature=temperature,
        shared_prompt=shared_prompt,
        head_in_float32=head_in_float32,
        router_coef=router_coef,
    )

    @functools.wraps(original)
    def forward(self: Any, *args: Any, fusedgrpo_packed: Any = None, **kwargs: Any) -> Any:
        if fusedgrpo_packed is None:
            return original(*args, **kwargs)
        if fusedgrpo_packed == "layout":
            return (packed_forward.layout,)  # DeepSpeed takes tensors and tuples only
        return packed_forward.logprobs(*fusedgrpo_packed)

    model.forward = types.MethodType(forward, model)
    model.fusedgrpo_forward = packed_forward
    return packed_forward


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
