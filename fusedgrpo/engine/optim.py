"""Optimizer and schedule by their transformers names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from fusedgrpo.engine.config import GRPOConfig

# transformers' name -> class in bitsandbytes.optim
BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def build_optimizer(
    config: GRPOConfig, parameters: Sequence[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """AdamW of ``config.optim``; weight decay on matrices only. Raises ConfigError."""
    if not parameters:
        raise ConfigError("No parameter is trainable: is finetuning_type right for this model?")
    matrices = [p for _, p in parameters if p.dim() >= 2]
    rest = [p for _, p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if config.optim in BITSANDBYTES:
        return _bitsandbytes(config.optim, groups, arguments, parameters[0][1].device)
    if config.optim == "adamw_torch_fused":
        arguments["fused"] = True
    return torch.optim.AdamW(groups, **arguments)


def _bitsandbytes(
    name: str, groups: list[dict[str, Any]], arguments: dict[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ConfigError(
            f"optim: {name} needs the package bitsandbytes ({error}). Install it or use "
            "adamw_torch."
        ) from error
    kind = getattr(bnb.optim, BITSANDBYTES[name])
    # What a device cannot do, bitsandbytes says at the first step: have that now, on a throwaway.
    trial = nn.Parameter(torch.zeros(8192, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        kind([trial], lr=0.0).step()
    except (NotImplementedError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"optim: {name} does not run on {device.type} here ({type(error).__name__}: {error}). "
            "Use adamw_torch."
        ) from error
    return kind(groups, **arguments)


def build_scheduler(
    config: GRPOConfig, optimizer: torch.optim.Optimizer, total_steps: int, done: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule; the rate is a function of the step, ``done`` steps are behind."""
    from transformers import get_scheduler

    warmup = config.warmup_steps
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
        num_training_steps=total_steps,
    )
    for _ in range(done):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # silences an order warning
        scheduler.step()
    return scheduler
