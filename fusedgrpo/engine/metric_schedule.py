"""Learning rates that follow the evaluations instead of the step, and the metric they go by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from fusedgrpo.config.schema import GRPOConfig

# Names of transformers' schedules.
BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def metric_name(config: GRPOConfig) -> str | None:
    """The metric of evaluations that is compared, with its prefix; None where none is."""
    name = config.metric_for_best_model
    if name is None and (
        config.load_best_model_at_end
        or config.save_strategy == "best"
        or config.lr_scheduler_type in BY_METRIC
    ):
        name = "reward"
    return name and "eval_" + name.removeprefix("eval_")


def greater_is_better(config: GRPOConfig) -> bool:
    """Whether more of that metric is better."""
    if config.greater_is_better is not None:
        return config.greater_is_better
    return not (metric_name(config) or "").endswith("loss")


class MetricSchedule:
    """A schedule of transformers or torch that takes a step with each evaluation: its ``step`` is
    the one that a learner takes after each update, and does nothing."""

    def __init__(self, schedule: Any, optimizer: torch.optim.Optimizer):
        self.schedule = schedule
        self.optimizer = optimizer

    def step(self) -> None: ...

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]


def observe(schedule: Any, metric: float | None) -> None:
    """An evaluation has been made: where ``schedule`` is one of these, it goes on."""
    if isinstance(schedule, MetricSchedule) and metric is not None:
        schedule.schedule.step(metric)


def state(schedule: Any) -> dict[str, Any] | None:
    """The state for a checkpoint; None for a schedule that is a function of the step."""
    if not isinstance(schedule, MetricSchedule):
        return None
    return {"schedule": schedule.schedule.state_dict(), "rates": schedule.get_last_lr()}


def restore(schedule: Any, saved: dict[str, Any] | None) -> None:
    """The inverse of ``state``."""
    if isinstance(schedule, MetricSchedule) and saved is not None:
        schedule.schedule.load_state_dict(saved["schedule"])
        for group, rate in zip(schedule.optimizer.param_groups, saved["rates"], strict=True):
            group["lr"] = rate
