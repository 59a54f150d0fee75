"""Dropout that a model has of its own, switched off while it trains.

Policy, old policy and reference are compared, so they have to be one computation: with dropout in
the update alone, ratio and KL of an untouched model are not 1 and 0.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

# Of modules and of configurations, which some families read in the forward pass. Jitter is the
# noise on a router's input; PhiMoE's `router_jitter_noise` is a threshold as well and stays.
_NAME = re.compile(r"drop|^(input_)?jitter_noise$|^moe_jitter_eps$")
# As in `layers.0.q_proj.lora_dropout.default`; peft names them so for every kind of adapter.
_ADAPTER = re.compile(r"(^|\.)\w+_dropout\.[^.]+$")


_DROPPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Place(NamedTuple):
    """One number that decides how much is dropped."""

    owner: Any
    name: str
    value: float


def own_dropout(model: nn.Module) -> list[Place]:
    """Where ``model`` drops something, apart from the dropout of its adapters, which is an option
    of theirs."""
    places = []
    owners: dict[int, Any] = {}
    for path, module in model.named_modules():
        if _ADAPTER.search(path):
            continue
        owners[id(module)] = module
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            owners[id(config)] = config
    for owner in owners.values():
        for name, value in vars(owner).items():
            named = _NAME.search(name) or (name == "p" and isinstance(owner, _DROPPING))
            if named and type(value) in (float, int) and 0 < value <= 1:
                places.append(Place(owner, name, value))
    return places


@contextlib.contextmanager
def switched_off(places: list[Place]) -> Iterator[None]:
    """Inside, nothing is dropped there. The values come back, so that what is saved is the model's
    own configuration."""
    try:
        for owner, name, _ in places:
            setattr(owner, name, 0.0)
        yield
    finally:
        for owner, name, value in places:
            setattr(owner, name, value)


@contextlib.contextmanager
def as_it_samples(model: nn.Module) -> Iterator[None]:
    """Inside, modules are in the mode that they sample in, for models that compute something else
    while they train: PhiMoE draws its experts at random. Not those of adapters, whose dropout is an
    option, nor a layer itself: its mode decides whether it is checkpointed."""
    changed = [
        module
        for path, module in model.named_modules()
        if module.training
        and not isinstance(module, GradientCheckpointingLayer)
        and not _ADAPTER.search(path)
    ]
    try:
        for module in changed:
            module.training = False
        yield
    finally:
        for module in changed:
            module.training = True


@torch.no_grad()
def computes_otherwise_in_training(
    model: nn.Module,
    decoder: Any,
    calmed: Callable[[nn.Module], contextlib.AbstractContextManager[None]] | None = None,
) -> bool:
    """Whether the hidden states of a few tokens depend on the mode of the modules, nothing dropped.
    calmed: entered around the pass in training mode. Comes back in the mode that the model was in.
    """
    ids = torch.arange(1, 9, device=next(model.parameters()).device)[None]
    modes = [(module, module.training) for module in model.modules()]

    def states() -> torch.Tensor:
        found: torch.Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state.float()
        return found

    try:
        with torch.random.fork_rng(), switched_off(own_dropout(model)):
            model.eval()
            want = states()
            model.train()
            for path, module in model.named_modules():
                if _ADAPTER.search(path):
                    module.eval()
            with contextlib.nullcontext() if calmed is None else calmed(model):
                got = states()
    finally:
        for module, training in modes:
            module.training = training
    return not bool((got - want).norm() <= 0.01 * want.norm())


def greatest(places: list[Place]) -> float:
    """The largest share that is dropped anywhere."""
    return max((place.value for place in places), default=0.0)
