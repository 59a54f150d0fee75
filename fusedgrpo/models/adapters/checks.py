"""Whether the adapters of a model can be trained here, before the first step."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fusedgrpo.errors import ModelError
from fusedgrpo.models.adapters.attached import Adapters, adapter_layers, folder_of, storage

log = logging.getLogger("fusedgrpo")

# Starts that change the base model, and that peft does not make again when it loads the adapter.
UNREPEATABLE = ("pissa_niter", "corda", "lora_ga")


def prepare(model: Any, compute_dtype: torch.dtype | None) -> Adapters:
    """Check that the adapters of ``model`` can train here and that all that trains will be saved.

    Weights that train become float32: in bfloat16 they would lose GRPO's small updates. Raises
    ModelError.
    """
    adapters = Adapters(model)
    for settings in adapters.configs.values():
        start = str(getattr(settings, "init_lora_weights", None))
        if start.startswith(UNREPEATABLE):
            raise ModelError(
                f"init_lora_weights={start!r} takes something random or measured out of the base "
                "model, which is not in the file of an adapter: loaded again it would be another "
                "model. Use 'pissa' or 'olora', which can be repeated, or leave it out."
            )
    if any(getattr(layer, "merged", False) for layer in adapter_layers(model)):
        raise ModelError(
            "The adapter is merged into the weights, so that it has no gradient: call "
            "model.unmerge_adapter() first."
        )
    trained = adapters.trained
    if not trained:
        raise ModelError(_nothing_trains(adapters))
    saved = {storage(t) for name in trained for t in adapters.tensors(name).values()}
    idle = {
        storage(t)
        for name in adapters.configs
        if name not in adapters.active
        for t in adapters.tensors(name).values()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or storage(parameter) in saved:
            continue
        if storage(parameter) not in idle:
            raise ModelError(
                f"{name} requires gradients but belongs to no active adapter: it would train and "
                "not be saved. Name its module in modules_to_save of the adapter, or freeze it "
                "with requires_grad_(False)."
            )
        parameter.requires_grad_(False)  # it acts on nothing, so it has no gradient either
    _to_float32(adapters, compute_dtype)
    for name in adapters.active:
        if name not in trained:
            log.info(
                "The adapter %r stays frozen; it is saved in adapter/%s.", name, folder_of(name)
            )
    if not adapters.base:
        log.info("The model has no name that it could be loaded by: adapter/ will name no base.")
    return adapters


def _nothing_trains(adapters: Adapters) -> str:
    active = adapters.active or list(adapters.configs)
    idle = [
        name
        for name in adapters.configs
        if name not in active and any(p.requires_grad for p in _parameters(adapters, name))
    ]
    names = ", ".join(repr(name) for name in active)
    if idle:
        return (
            f"The adapter {idle[0]!r} requires gradients, but active is {names}, which does not. "
            f"Call model.set_adapter({idle[0]!r}) first."
        )
    return (
        f"No weight of the adapter {names} requires gradients: it was loaded for inference. Load "
        "it with is_trainable=True, as in PeftModel.from_pretrained(model, folder, "
        f"is_trainable=True), or call model.set_adapter({active[0]!r}); a folder or Hub id can "
        "also be given as model itself or as adapter_name_or_path."
    )


def _parameters(adapters: Adapters, name: str) -> list[nn.Parameter]:
    own = {storage(t) for t in adapters.tensors(name).values()}
    return [p for p in adapters.model.parameters() if storage(p) in own]


def _to_float32(adapters: Adapters, compute_dtype: torch.dtype | None) -> None:
    """Without autocast a module that is trained whole must keep the dtype of its neighbours; the
    layers of an adapter convert by themselves."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype = adapters.causal_lm.dtype
    converts = {
        id(parameter)
        for layer in adapters.model.modules()
        if isinstance(layer, BaseTunerLayer)
        for names in layer.adapter_layer_names
        for parameter in _below(layer, names)
    }
    raised, kept = 0, 0
    for parameter in adapters.model.parameters():
        if not parameter.requires_grad or parameter.dtype == torch.float32:
            continue
        if compute_dtype is not None or dtype == torch.float32 or id(parameter) in converts:
            parameter.data = parameter.data.float()
            raised += 1
        else:
            kept += 1
    if raised:
        log.info(
            "%d tensors of the adapter that were in 16 bits train, and are saved, in float32.",
            raised,
        )
    if kept:
        log.warning(
            "%d tensors train in %s: updates below 1/256 of a weight are lost. Load the model with "
            "dtype=torch.float32, or compute with bf16: true.",
            kept,
            str(dtype).removeprefix("torch."),
        )


def _below(layer: Any, name: str) -> list[nn.Parameter]:
    holder: Any = layer
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return list(holder.parameters()) if isinstance(holder, nn.Module) else []
