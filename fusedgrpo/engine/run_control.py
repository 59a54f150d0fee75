"""When a run logs, evaluates and saves."""

from __future__ import annotations

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import BatchPlan


class RunControl:
    """Steps are optimizer steps, counted from 1."""

    def __init__(self, args: GRPOConfig, plan: BatchPlan):
        self.args = args
        self.total_steps = plan.total_steps
        self.logging_steps = args.logging_steps
        self.save_steps = args.save_steps
        self.eval_steps = args.eval_steps or args.logging_steps

    def logs(self, step: int) -> bool:
        """Whether the metrics of ``step`` are logged, in transformers' sense."""
        return step % self.logging_steps == 0

    def evaluates(self, step: int) -> bool:
        return self.args.eval_strategy == "steps" and step % self.eval_steps == 0

    def saves(self, step: int) -> bool:
        """Whether the checkpoint of ``step``, evaluated if it had to be, is to be written."""
        return self.args.save_strategy == "steps" and step % self.save_steps == 0
