"""Models of an architecture on the meta device, bare or with what trains; and fake weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedgrpo.engine.memory.fake_layers import FourBitLinear, four_bit_bytes
from fusedgrpo.models.adapters.attached import adapter_layers
from fusedgrpo.models.adapters.lora import add_lora
from fusedgrpo.models.at_rest import frozen_linear, store
from fusedgrpo.models.device import asked_compute_dtype, resting_dtype, stored_dtype
from fusedgrpo.models.dropout import own_dropout

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig


def compute_dtype(config: GRPOConfig) -> torch.dtype:
    """The dtype that the GPU computes in: what is planned for has bfloat16."""
    return asked_compute_dtype(config.bf16, config.fp16) or torch.float32


def bare_model(config: GRPOConfig, settings: Any, layers: int | None = None) -> Any:
    """The causal LM on the meta device, without adapters; with ``layers`` decoder layers."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = copy.deepcopy(settings)
    text = settings.get_text_config()
    if layers is not None:
        text.num_hidden_layers = layers
        if types := getattr(text, "layer_types", None):
            text.layer_types = [*types, *types[-1:] * layers][:layers]
    computed = asked_compute_dtype(config.bf16, config.fp16)
    dtype = stored_dtype(config, computed) or text.dtype or torch.float32
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        if config.disable_dropout:  # with dropout, a mask is saved for each
            for place in own_dropout(model):
                setattr(place.owner, place.name, 0.0)
        if config.load_in_4bit:
            kept = get_keys_to_not_convert(model)
            for name, module in list(model.named_modules()):
                if type(module) is nn.Linear and not any(k in name for k in kept):
                    module.__class__ = FourBitLinear
        if rests := resting_dtype(config, computed):
            head = model.get_output_embeddings()
            store(frozen_linear(model.requires_grad_(False)), head, rests)
    return model


def adapted_model(config: GRPOConfig, settings: Any, layers: int) -> Any:
    """The same with what trains: adapters, or all of it."""
    model = bare_model(config, settings, layers)
    with torch.device("meta"):
        if config.finetuning_type == "full":
            return model.requires_grad_(True)
        wrapped: Any = add_lora(model, config)
    if config.load_in_4bit:
        for module in wrapped.modules():
            # peft's 4-bit layers leave the input as it is under autocast.
            module.cast_input_dtype_enabled = False
    return wrapped


def with_copies(config: GRPOConfig, settings: Any, layers: int) -> Any:
    """The same with dense weights wherever there is an adapter, as in copies of the weights."""
    model = adapted_model(config, settings, layers)
    for layer in adapter_layers(model):
        base = layer.get_base_layer()
        if isinstance(base, FourBitLinear):
            base.__class__ = nn.Linear  # type: ignore[assignment]
        base.to(compute_dtype(config))
    return model


def fill(model: nn.Module) -> None:
    """Fake tensors in place of those on the meta device; packed ones in 4-bit layers."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in made:
                if isinstance(module, FourBitLinear) and name == "weight":
                    new = torch.empty(four_bit_bytes(old.numel(), True), dtype=torch.uint8)
                else:
                    new = torch.empty(old.shape, dtype=old.dtype)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(module, name, made[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
