"""Optimizer and schedule by their transformers names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fusedgrpo.config.learning import learning_rate
from fusedgrpo.engine.metric_schedule import BY_METRIC, MetricSchedule, greater_is_better
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
# Those that transformers makes.
OTHERS_OF_BITSANDBYTES = (
    "ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit",
    "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)  # fmt: skip


# Packages of optimizers that are not torch's, transformers' or bitsandbytes'.
_INSTALL = {
    "stable_adamw": "pip install torch-optimi",
    "grokadamw": "pip install grokadamw",
    "adamw_anyprecision": "pip install git+https://github.com/pytorch/torchdistx",
}
# Schedules that have no settings.
_FIXED = ("constant", "constant_with_warmup")


def check_options(config: GRPOConfig) -> None:
    """Raise ConfigError where there is no such optimizer here, or where it or the schedule does not
    have the settings that were given: before there is a model."""
    _kind(config)
    given = config.lr_scheduler_kwargs or {}
    if given and config.lr_scheduler_type in _FIXED:
        raise ConfigError(
            f"lr_scheduler_kwargs: lr_scheduler_type {config.lr_scheduler_type} has no settings, "
            f"got {', '.join(sorted(given))}. Leave them out."
        )
    # The number of steps is not known yet; long enough for any warm-up that was counted.
    total = max(config.max_steps, int(config.warmup_steps) + 100)
    build_scheduler(config, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), total)


def build_optimizer(
    config: GRPOConfig, parameters: Sequence[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The optimizer of ``config.optim``; weight decay on matrices only.

    No step of AdamW and of bitsandbytes' optimizers allocates anything, so that none can run out of
    memory halfway through the weights: their state is in place, and torch's AdamW is the fused one
    by either name. The others make theirs in the first step. Raises ConfigError.
    """
    if not parameters:
        raise ConfigError("No parameter is trainable: is finetuning_type right for this model?")
    matrices = [p for _, p in parameters if p.dim() >= 2]
    rest = [p for _, p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind, arguments = _kind(config)
    of_bitsandbytes = kind.__module__.startswith("bitsandbytes")
    if kind is not torch.optim.AdamW:
        _try_out(config.optim, kind, arguments, parameters[0][1].device)
    optimizer: torch.optim.Optimizer = kind(groups, **arguments)
    if of_bitsandbytes or kind is torch.optim.AdamW:
        make_state(optimizer)
    return optimizer


def _kind(config: GRPOConfig) -> tuple[Any, dict[str, Any]]:
    """Class and arguments of an optimizer. Raises ConfigError."""
    name, given = config.optim, config.optim_args
    if given:
        _check_settings(config, given)
    adam: dict[str, Any] = {
        "lr": learning_rate(config),
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if name in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW, adam | {"fused": True}
    if name in BITSANDBYTES:
        return getattr(_bitsandbytes(name).optim, BITSANDBYTES[name]), adam
    if name in OTHERS_OF_BITSANDBYTES:
        _bitsandbytes(name)
    try:
        return _of_transformers(config, given)
    except (ImportError, ValueError) as error:
        install = _INSTALL.get(name)
        text = f"optim: {name} cannot be made ({error})."
        raise ConfigError(
            f"{text} {f'{install}, or use' if install else 'Use'} adamw_torch."
        ) from error


def _of_transformers(config: GRPOConfig, optim_args: str | None) -> tuple[Any, dict[str, Any]]:
    from transformers import Trainer

    names = ("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    asked: Any = SimpleNamespace(
        **{name: getattr(config, name) for name in names},
        learning_rate=learning_rate(config),
        optim_args=optim_args,
    )
    kind, arguments = Trainer.get_optimizer_cls_and_kwargs(asked)
    arguments.pop("weight_decay", None)  # that of the groups counts
    return kind, arguments


def _check_settings(config: GRPOConfig, given: str) -> None:
    """ConfigError for what transformers would not read of ``optim_args``: leaving a setting out, or
    another value of it, changes nothing then."""
    pairs = [pair.strip() for pair in given.split(",")]
    for pair in pairs:
        name = pair.partition("=")[0].strip()
        if name == "weight_decay":
            raise ConfigError("optim_args: weight_decay is an option of its own.")
        others = [other for other in pairs if other is not pair]
        try:
            whole = _of_transformers(config, given)
            changed = [
                _of_transformers(config, ",".join(some)) != whole
                for some in (others, [*others, f"{pair}1"])
            ]
        except (ImportError, ValueError):
            continue  # a value that it reads and does not take, which is said where it is made
        if not any(changed):
            raise ConfigError(f"optim_args: {config.optim} has no setting {name}. Leave it out.")


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


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ConfigError(
            f"optim: {name} needs the package bitsandbytes ({error}). pip install bitsandbytes, or "
            "use adamw_torch."
        ) from error
    return bnb


def _try_out(name: str, kind: Any, arguments: dict[str, Any], device: torch.device) -> None:
    """Make one for a throwaway and take its first step: that is where an optimizer says what its
    device cannot do, and which settings it does not take. Raises ConfigError."""
    trial = nn.Parameter(torch.zeros(8192, device=device))
    trial.grad = torch.zeros_like(trial)
    try:
        kind([trial], **arguments | {"lr": 0.0}).step()
    except (NotImplementedError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"optim: {name} does not run on {device.type} here ({type(error).__name__}: {error}). "
            "Use adamw_torch."
        ) from error


def build_scheduler(
    config: GRPOConfig,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
    done: int = 0,
    before: Any = None,
) -> Any:
    """transformers' schedule; the rate is a function of the step, ``done`` steps are behind. One
    that follows evaluations goes on as it is, if it is the one ``before``. Raises ConfigError."""
    if isinstance(before, MetricSchedule):
        return before
    from transformers import get_scheduler

    warmup = config.warmup_steps
    settings = dict(config.lr_scheduler_kwargs or {})
    by_metric = config.lr_scheduler_type in BY_METRIC
    if by_metric:
        settings.setdefault("mode", "max" if greater_is_better(config) else "min")
    try:
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"lr_scheduler_kwargs: {config.lr_scheduler_type} cannot be made of "
            f"{config.lr_scheduler_kwargs or 'no settings'}: {error}."
        ) from error
    if by_metric:
        return MetricSchedule(scheduler, optimizer)
    for _ in range(done):
        optimizer._opt_called = True  # type: ignore[attr-defined]  # silences an order warning
        scheduler.step()
    return scheduler
