"""After a step of a trainer: state is counted, its row is made, evaluation and save are due."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedgrpo.engine import metric_schedule, nonfinite
from fusedgrpo.engine.checkpointer import Checkpointer
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.collector import Collected
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.drift_check import Chosen, DriftCheck
from fusedgrpo.engine.evaluating import Evaluating
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.held_out_check import HeldOutCheck
from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.learner import UpdateResult
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.metric_names import merged
from fusedgrpo.engine.reporting.phase_timer import PhaseTimer
from fusedgrpo.engine.reporting.run_logger import RunLogger
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.engine.step_bounds import StepBounds


class StepRecords(Evaluating):
    """The part of a trainer that takes in what ``step`` has made."""

    tokenizer: Any
    execution: Execution
    signals: StopSignals
    stream: PromptStream
    progress: Progress
    unwritten: Unwritten
    buffer: RolloutBuffer | None
    memory_peaks: dict[str, float]
    run_control: RunControl
    checkpointer: Checkpointer
    held_out_check: HeldOutCheck
    drift_check: DriftCheck
    bounds: StepBounds

    @property
    def finished(self) -> bool:
        raise NotImplementedError

    @property
    def memory_plan(self) -> MemoryPlan | None:
        raise NotImplementedError

    def _push_saved(self, saved: Path) -> None:
        raise NotImplementedError

    def _before_update(self) -> None:
        """Gradients are there, and nothing is changed yet."""
        self.events.fire("on_pre_optimizer_step")
        self.checkpointer.begins()

    def _tell_of_step(self) -> None:
        """The step is counted: what is to come of it is the callbacks' to say."""
        self.events.means.add(self.unwritten.rows[-1])
        self.events.end_step()
        self.unwritten.evaluation_due = self.control.should_evaluate
        self._log_if_due()

    def _log_if_due(self) -> None:
        if self.control.should_log and (logs := self.events.means.take()):
            self.log(logs)

    def _save_if_due(self, outputs: RunLogger) -> None:
        due = outputs.writes and self.events.saves
        saved = self.processes.run_on_main(lambda: self.checkpointer.save_if_due(outputs, due))
        if saved is not None:
            self.events.fire("on_save")
            self._push_saved(saved)

    def _measure(self, row: dict[str, Any]) -> None:
        """Add to a row what all processes together took."""
        for name in [name for name in row if name.startswith("memory/")]:
            row[name] = max(self.processes.gather(row[name]))
            self.memory_peaks[name] = max(self.memory_peaks.get(name, 0), row[name])
        if self.memory_plan is not None:
            row["memory/planned"] = self.memory_plan.peak
        if retries := sum(self.processes.gather(self.execution.oom_retry.take_retries())):
            row["memory/retries"] = retries

    def _finish_row(self, outputs: RunLogger) -> dict[str, Any]:
        """Evaluate if the row of the last step waits for that, end the epoch if it is over, then
        write and show the row."""
        row = self.unwritten.rows[-1]
        metrics: dict[str, Any] = {}
        if self.unwritten.evaluation_due:
            metrics = self._evaluate_for(row, outputs)
        if self.events.epoch_ends(last=self.finished):
            stopped = self.control.should_epoch_stop
            behind = self.events.end_epoch()
            self._log_if_due()
            if self.control.should_evaluate and not metrics:
                metrics = self._evaluate_for(row, outputs)
            if stopped:
                self._skip_to(behind)
        outputs.write(self.unwritten, self.progress.step)
        evaluated = [("on_evaluate", self.progress.step, metrics)] if metrics else []
        self.processes.run_on_main(lambda: outputs.tell(*evaluated, ("on_step", row)))
        return row

    def _evaluate_for(self, row: dict[str, Any], outputs: RunLogger) -> dict[str, Any]:
        metrics = self._evaluate(outputs)
        compared = self.run_control.observe(self.progress.step, metrics)
        metric_schedule.observe(self.learner.scheduler, compared)
        self.events.follow()
        row |= metrics
        self.unwritten.evaluation_due = False
        return metrics

    def _evaluate(self, outputs: RunLogger) -> dict[str, Any]:
        """The metrics of an evaluation, whose completions are left to be written."""
        outputs.display.phase("evaluate")
        self.evaluates_loss = self.run_control.metric_name == "eval_loss"
        self.answers = [] if outputs.writes else None
        try:
            metrics = self.evaluate()
            if self.answers:
                self.unwritten.evaluations[self.progress.step] = self.answers
        finally:
            self.evaluates_loss, self.answers = True, None
        return metrics

    def _check_held_out(self, outputs: RunLogger, due: bool) -> None:
        """Answer the held-out prompts, unless this was done after the same step already."""
        step = self.progress.step
        if due and self.processes.run_on_main(lambda: outputs.lacks_answers(step)):
            outputs.display.phase("check")
            outputs.answered(step, self.held_out_check.run())

    def _begin_drift_check(self, outputs: RunLogger) -> Chosen | None:
        """Score a few completions of the next step before its update, if it is to be checked."""
        step = self.progress.step + 1
        if step not in self.drift_check.steps() or not self._writes(outputs):
            return None
        outputs.display.phase("check")
        return self.drift_check.choose(step, score=True)

    def _end_drift_check(self, outputs: RunLogger, begun: Chosen | None) -> None:
        """Score them after the update, which was applied. That a step is the last one may only be
        known now: nothing was scored before its update then."""
        step = self.progress.step
        stops = (self.finished or self.control.should_training_stop) and self.args.drift_check
        if begun is None and stops and self.buffer is not None and self._writes(outputs):
            begun = self.drift_check.choose(step, score=False)
        if begun is not None:
            outputs.display.phase("check")
            outputs.drifted(step, self.drift_check.records(begun))

    def _writes(self, outputs: RunLogger) -> bool:
        return self.processes.run_on_main(lambda: outputs.writes)

    def _skip_to(self, prompts: int) -> None:
        """Leave out what is left of an epoch that a callback has stopped."""
        with self.signals.held():
            self.buffer = None
            self.stream.cursor = self.progress.cursor = max(self.stream.cursor, prompts)

    def _take(self, buffer: RolloutBuffer, collected: Collected, outputs: RunLogger) -> None:
        """The rollout is whole: from here on its prompts are used and its tokens counted."""
        groups = collected.rollout.groups
        records = self.collector.records(collected, buffer)
        tokens = sum(
            len(group.prompt_ids) + c.own_tokens for group in groups for c in group.completions
        )
        with self.signals.held():
            self.buffer = buffer
            self.unwritten.completions[self.progress.step + 1] = records
            self.stream.observe(collected.examples, collected.totals.numpy())
            self.stream.cursor += len(groups)
            buffer.metrics |= self.stream.metrics()
            self.progress.cursor = self.stream.cursor
            self.progress.rollouts += 1
            self.progress.num_tokens += tokens
        outputs.write(self.unwritten, self.progress.step + 1)
        told = "on_rollout", self.progress.step + 1, records
        self.processes.run_on_main(lambda: outputs.tell(told))

    def _accept(
        self,
        result: UpdateResult,
        samples: Sequence[TrainingSample],
        outputs: RunLogger,
        timer: PhaseTimer,
    ) -> None:
        """Count a step and make its row; halt on one that is not finite."""
        nonfinite.check_weights(self.learner, result, self.progress.step + 1)
        nonfinite.count(
            self.progress,
            self.learner,
            result,
            lambda: outputs.dump(
                self.progress.step + 1,
                samples,
                decode=self.tokenizer.decode,
                loss=result.loss,
                grad_norm=result.grad_norm,
                seed=self.args.seed,
                rollout=self.progress.rollouts - 1,
            ),
            self.args.max_nonfinite_steps,
        )
        assert self.buffer is not None
        tokens = sum(sample.own_tokens for sample in samples)
        with self.signals.held():
            self.buffer.done += 1
            self.progress.step += 1
            row = {
                "step": self.progress.step,
                "epoch": self.stream.epoch,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "num_tokens": self.progress.num_tokens,
                **result.metrics,
                **({} if result.applied else {"skipped_update": 1}),
                **timer.metrics(tokens),
            }
            row |= self.bounds.reached(row, samples)
            self.unwritten.rows.append(merged(row, self.buffer.metrics))
            self.unwritten.evaluation_due = self.run_control.evaluates(self.progress.step)
            self.events.follow()
