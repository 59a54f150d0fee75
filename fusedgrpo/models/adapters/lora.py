"""A new adapter on a frozen model."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError, ModelError, brief, reason
from fusedgrpo.models.adapters.attached import adapter_layers
from fusedgrpo.models.adapters.kinds import acts_outside
from fusedgrpo.models.adapters.lora_targets import all_linear

log = logging.getLogger("fusedgrpo")


def add_lora(model: nn.Module, config: GRPOConfig, peft_config: Any = None) -> nn.Module:
    """``model`` frozen, with a new adapter."""
    from peft import LoraConfig, get_peft_model

    ours = peft_config is None
    if ours:
        targets = config.lora_target_modules
        peft_config = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha or 2 * config.lora_r,
            lora_dropout=config.lora_dropout,
            target_modules=all_linear(model) if targets == "all-linear" else list(targets),
            use_rslora=config.use_rslora,
            task_type="CAUSAL_LM",
            revision=config.model_revision,
        )
    if not hasattr(peft_config, "is_prompt_learning"):
        raise ConfigError(
            f"peft_config: expected a configuration of peft such as LoraConfig, got "
            f"{type(peft_config).__name__}."
        )
    check_kind(peft_config)
    # A note of an adapter that was taken out again would count as one of several.
    if hasattr(model, "peft_config"):
        del model.peft_config
    try:
        # The adapters' first weights are a random choice of the run like all others.
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(config.seed)
            # peft asks transformers under a name that transformers has deprecated since.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
    except Exception as error:  # also memory that is not there, for an adapter of such a rank
        blamed = "peft_config"
        if ours:
            blamed = f"lora_target_modules={brief(config.lora_target_modules)}, r={config.lora_r}"
        raise ModelError(f"{blamed}: {reason(error)}") from error
    return model


def check_kind(settings: Any) -> None:
    """Refuse adapters that the forward pass here would not see."""
    outside = acts_outside(settings)
    if outside is not None:
        raise ModelError(
            f"peft_config: {outside}, and is not supported. Use LoRA or another adapter inside the "
            "model; or TRL's forward pass, which fusedgrpo.integrations.trl.FusedGRPOTrainer takes "
            "for it."
        )
    if settings.peft_type == "ADALORA":
        log.warning(
            "%s: ranks stay as they begin, as in TRL: nothing calls update_and_allocate.",
            type(settings).__name__,
        )


def does_nothing(model: Any) -> bool:
    """Whether a model with a new adapter still computes what it did without: a LoRA of which one of
    the two factors is 0. Weights that are trained beside it begin as copies. Of other kinds, and of
    starts that change the model's own weights (PiSSA, OLoRA), it is not said."""
    if any(settings.peft_type != "LORA" for settings in model.peft_config.values()):
        return False
    factors = [
        getattr(layer, name)
        for layer in adapter_layers(model)
        for name in ("lora_B", "lora_embedding_A")
        if hasattr(layer, name)
    ]
    return not any(weight.any() for each in factors for weight in each.parameters())
