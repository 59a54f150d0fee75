"""A causal LM that scores packed batches inside its own ``forward``.

Trainers hand out models in wrappers (DDP, FSDP, DeepSpeed, peft, autocast) that do their work
around ``forward``, so the packed pass goes through it: ``model(fusedgrpo_packed=(batch, entropy))``
returns log-probs and entropies.
"""

from __future__ import annotations

import functools
import types
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusedgrpo.kernels import LogProbs, linear_logprob
from fusedgrpo.models.layout import SharedPrompt
from fusedgrpo.models.packed import Layout, PackedBatch
from fusedgrpo.models.policy import Policy


class PackedForward:
    """What ``install`` leaves on a model as ``fusedgrpo_forward``."""

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        temperature: float,
        shared_prompt: SharedPrompt,
        head_in_float32: bool,
    ):
        self._causal_lm = causal_lm
        self._temperature = temperature
        self._shared_prompt: SharedPrompt = shared_prompt
        self._head_in_float32 = head_in_float32

    @functools.cached_property
    def policy(self) -> Policy:
        # At the first use: sharded weights are not there before the first forward.
        return Policy(
            self._causal_lm,
            compute_dtype="inherit",
            temperature=self._temperature,
            shared_prompt=self._shared_prompt,
        )

    @property
    def layout(self) -> Layout:
        return self.policy.layout

    def logprobs(self, packed: PackedBatch, entropy: bool | Literal["detached"]) -> LogProbs:
        """``Policy.logprobs`` in the precision that the caller's wrappers have set."""
        policy = self.policy
        hidden = policy.hidden(packed)
        head = policy.head
        weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
        device_type = hidden.device.type
        if self._head_in_float32:
            hidden, weight = hidden.float(), weight.float()
        elif not torch.is_autocast_enabled(device_type):
            hidden = hidden.to(weight.dtype)
        inherited = torch.is_autocast_enabled(device_type) and not self._head_in_float32
        with torch.autocast(device_type, enabled=inherited):
            return linear_logprob(
                hidden.to(weight.device),
                weight,
                packed.targets.to(weight.device),
                bias=bias,
                temperature=self._temperature,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                return_entropy=entropy,
            )


def install(
    causal_lm: nn.Module,
    *,
    temperature: float = 1.0,
    shared_prompt: SharedPrompt = "auto",
    head_in_float32: bool = False,
) -> PackedForward:
    """Teach ``causal_lm`` the keyword ``fusedgrpo_packed``; calls without it are what they were."""
    model: Any = causal_lm
    original = model.forward
    packed_forward = PackedForward(
        causal_lm,
        temperature=temperature,
        shared_prompt=shared_prompt,
        head_in_float32=head_in_float32,
    )

    @functools.wraps(original)
    def forward(self: Any, *args: Any, fusedgrpo_packed: Any = None, **kwargs: Any) -> Any:
        if fusedgrpo_packed is None:
            return original(*args, **kwargs)
        packed, entropy = fusedgrpo_packed
        return tuple(packed_forward.logprobs(packed, entropy))

    model.forward = types.MethodType(forward, model)
    model.fusedgrpo_forward = packed_forward
    return packed_forward


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered where FSDP2 has sharded it."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()
