"""An optimizer, and maybe a schedule, that the user has made: checked against what is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fusedgrpo.errors import ConfigError


def check_optimizers(given: Any) -> tuple[torch.optim.Optimizer | None, Any]:
    """``(optimizer, scheduler)`` of the argument ``optimizers``; both None where it asks for
    nothing. Raises ConfigError for anything else."""
    if given is None:
        return None, None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ConfigError(
            f"optimizers: expected (optimizer, scheduler), the scheduler None for that of "
            f"lr_scheduler_type; got {type(given).__name__}."
        )
    optimizer, scheduler = given
    if optimizer is None and scheduler is None:
        return None, None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizers: expected a torch.optim.Optimizer first, got {type(optimizer).__name__}."
            " A scheduler alone schedules an optimizer that is not used."
        )
    if scheduler is not None:
        _check_scheduler(scheduler, optimizer)
    return optimizer, scheduler


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) or isinstance(
        scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
    ):
        raise ConfigError(
            "optimizers: expected a torch.optim.lr_scheduler.LRScheduler second, which is a "
            f"function of the step, got {type(scheduler).__name__}."
        )
    if scheduler.optimizer is not optimizer:
        raise ConfigError("optimizers: the scheduler is of another optimizer than the one given.")
    try:
        json.dumps(scheduler.state_dict())
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizers: the state of {type(scheduler).__name__} goes into checkpoints, which "
            f"hold JSON, and cannot: {error}. Use a LambdaLR."
        ) from error


def check_parameters(
    optimizer: torch.optim.Optimizer, trainable: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Raise ConfigError unless the optimizer has all parameters that are trained, and no other that
    has gradients: it would train what is not the policy, or leave out what is."""
    names = {id(p): name for name, p in trainable}
    given = [p for group in optimizer.param_groups for p in group["params"]]
    own = {id(p) for p in given}
    missing = [name for key, name in names.items() if key not in own]
    strange = sum(p.requires_grad and id(p) not in names for p in given)
    if missing or strange:
        raise ConfigError(
            f"optimizers: the optimizer lacks {len(missing)} of the {len(names)} parameters that "
            f"are trained (such as {missing[0] if missing else 'none'}) and has {strange} others. "
            "Make it of [p for p in model.parameters() if p.requires_grad], of the model that is "
            "passed, with its adapter in it (peft.get_peft_model) unless finetuning_type is full."
        )
