"""When a run logs, evaluates and saves, and which of its evaluations is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpoint_files, metric_schedule
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far: after which step, and its metric."""

    step: int
    metric: float


class RunControl:
    """Steps are optimizer steps, counted from 1. Strategies, shares of the run and the choice of
    the best follow transformers' trainer; an epoch ends with the step that comes to the end of the
    data, and the last one with the run.

    best: None before the first evaluation, and where no metric is compared.
    """

    def __init__(self, args: GRPOConfig, plan: BatchPlan):
        self.args = args
        self.total_steps = plan.total_steps
        # Prompts and steps of a rollout, which a whole number of steps trains on.
        self._per_epoch = plan.steps_per_rollout * plan.num_iterations * plan.num_prompts
        self._per_step = plan.groups_per_rollout
        self.logging_steps = self._whole(args.logging_steps)
        self.save_steps = self._whole(args.save_steps)
        self.eval_steps = self._whole(args.eval_steps or args.logging_steps)
        self.best: Best | None = None

    def _whole(self, steps: float) -> int:
        """A number of steps; below 1 it is a share of the run, rounded up."""
        return math.ceil(self.total_steps * steps) if steps < 1 else int(steps)

    def ends_epoch(self, step: int) -> bool:
        before, after = ((step - k) * self._per_step // self._per_epoch for k in (1, 0))
        return after > before or step == self.total_steps

    def _is_due(self, strategy: str, every: int, step: int) -> bool:
        return (strategy == "steps" and step % every == 0) or (
            strategy == "epoch" and self.ends_epoch(step)
        )

    def logs(self, step: int) -> bool:
        """Whether the metrics of ``step`` are logged, in transformers' sense."""
        first = step == 1 and self.args.logging_first_step
        return first or self._is_due(self.args.logging_strategy, self.logging_steps, step)

    def shows(self, step: int, first: bool) -> bool:
        """Whether a step gets a line where there is no panel; ``first``: it would be the first."""
        if self.args.logging_strategy == "no":
            return self.logs(step)
        return first or step == self.total_steps or self.logs(step)

    def evaluates(self, step: int) -> bool:
        return self._is_due(self.args.eval_strategy, self.eval_steps, step)

    def evaluates_first(self, done: int) -> bool:
        """Whether the run begins with an evaluation; one that goes on does not."""
        return self.args.eval_on_start and not done

    def saves(self, step: int) -> bool:
        """Whether the checkpoint of ``step``, evaluated if it had to be, is to be written."""
        args = self.args
        best = self.best is not None and self.best.step == step
        kept = args.save_strategy == "best" or args.load_best_model_at_end
        return self._is_due(args.save_strategy, self.save_steps, step) or (best and kept)

    # --- the best -------------------------------------------------------------------------------

    @property
    def metric_name(self) -> str | None:
        """The metric of evaluations that is compared, with its prefix."""
        return metric_schedule.metric_name(self.args)

    @property
    def greater_is_better(self) -> bool:
        return metric_schedule.greater_is_better(self.args)

    def observe(self, step: int, metrics: Mapping[str, Any]) -> float | None:
        """Compare the evaluation of ``step`` with the best so far; one that is as good is not
        better. Returns its metric; None if that is not finite, or none is compared. Raises
        ConfigError if it does not have the metric."""
        name = self.metric_name
        if name is None:
            return None
        if name not in metrics:
            raise ConfigError(
                f"metric_for_best_model: evaluation gives no {name}; there are "
                f"{', '.join(sorted(metrics))}."
            )
        value = metrics[name]
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        sign = 1 if self.greater_is_better else -1
        if self.best is None or sign * value > sign * self.best.metric:
            self.best = Best(step, float(value))
        return float(value)

    def to_record(self) -> dict[str, Any] | None:
        """The best, for ``state.json``."""
        return None if self.best is None else {"step": self.best.step, "metric": self.best.metric}

    def restore(self, record: Mapping[str, Any] | None) -> None:
        """Go on with what ``to_record`` gave; checkpoints of versions before have none."""
        self.best = None if record is None else Best(record["step"], record["metric"])

    @property
    def best_metric(self) -> float | None:
        """As in transformers' ``TrainerState``."""
        return None if self.best is None else self.best.metric

    @property
    def best_global_step(self) -> int | None:
        """As in transformers' ``TrainerState``."""
        return None if self.best is None else self.best.step

    @property
    def best_model_checkpoint(self) -> Path | None:
        """Where the weights of the best are, if they were saved."""
        if self.best is None:
            return None
        directory = Path(self.args.output_dir).expanduser().absolute() / "checkpoints"
        path = checkpoint_files.of_step(directory, self.best.step)
        return path if path.is_dir() else None
