"""Optimizer and schedule by their transformers names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

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
    """AdamW of ``config.optim``, its state in place; weight decay on matrices only.

    No step of it allocates anything, so that none can run out of memory halfway through the
    weights: torch's AdamW is the fused one by either name. Raises ConfigError.
    """
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
    optimizer: torch.optim.Optimizer
    if config.optim in BITSANDBYTES:
        optimizer = _bitsandbytes(config.optim, groups, arguments, parameters[0][1].device)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **arguments)
    make_state(optimizer)
    return optimizer


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer allocate its state now, by a step that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        count = optimizer.state[parameter]["step"]
        zero = torch.zeros_like(count) if isinstance(count, torch.Tensor) else 0
        optimizer.state[parameter]["step"] = zero


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
