"""Everything that a run shows and writes beside its checkpoints."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import yaml

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.callbacks import Callback
from fusedgrpo.engine.checkpoint_files import abandon_after
from fusedgrpo.engine.execution import Progress
from fusedgrpo.engine.reporting.advisor import Advisor
from fusedgrpo.engine.reporting.completions_folding import FoldingLog
from fusedgrpo.engine.reporting.completions_log import CompletionsLog
from fusedgrpo.engine.reporting.disk_refusals import Refusals, writing_to
from fusedgrpo.engine.reporting.display import Display
from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.live_report import LiveReport
from fusedgrpo.engine.reporting.metrics_log import MetricsLog, Row, finite, read_metrics
from fusedgrpo.engine.reporting.report import write_report
from fusedgrpo.engine.reporting.rollout_line import rollout_progress
from fusedgrpo.engine.reporting.run_dir import RunDir
from fusedgrpo.engine.reporting.run_facts import run_facts
from fusedgrpo.engine.reporting.sample_dump import dump_samples
from fusedgrpo.engine.reporting.shown_steps import ShownAdvice, ShownCompletions
from fusedgrpo.engine.reporting.trackers import Place, Trackers
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.errors import OutputDirError

log = logging.getLogger("fusedgrpo")

T = TypeVar("T")
Records = TypeVar("Records", bound=Sequence[Mapping[str, Any]])


def _write_all(waiting: dict[int, Records], log: CompletionsLog) -> None:
    """Write what waits for it, by step; what is written waits no more."""
    for step in sorted(waiting):
        log.write(step, waiting[step])
        del waiting[step]


class RunLogger:
    """One run's directory, metrics, display, trackers and advice; open it with ``opened``."""

    writes = True

    def __init__(
        self,
        config: GRPOConfig,
        run: RunDir,
        stack: ExitStack,
        *,
        total_steps: int,
        done: int,
        plan_line: str,
        eos_ids: Sequence[int],
        unwritten: Unwritten,
        branch: bool,
        sampled_ahead: bool,
        callbacks: Sequence[Callback] = (),
        shows: Callable[[int, bool], bool] | None = None,
    ):
        """done: steps behind a run that goes on; branch: from a checkpoint; sampled_ahead: the
        completions of the next step are there already. unwritten: of its rows, those that wait for
        nothing are in the file after this. callbacks: the user's, called after our own.
        shows: as ``Display``."""
        self.config = config
        self.run = run
        self.refusals = Refusals(run)
        settings = config.to_record()
        run.config.write_text(
            yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        # Now, so that a link to a disk that is not there fails here and not at the first save.
        run.checkpoints.mkdir(exist_ok=True)
        self.metrics = stack.enter_context(MetricsLog(run.metrics))
        self.advisor = Advisor(settings, eos_token_ids=eos_ids)
        self.completions_log = FoldingLog(run.completions)
        self.evaluations_log = FoldingLog(run.eval_completions)
        self.held_out_log = CompletionsLog(run.held_out)
        self._answers: dict[int, Sequence[Mapping[str, Any]]] = {}  # to be written, by step
        self.drift_log = CompletionsLog(run.drift)
        self._drifts: dict[int, Sequence[Mapping[str, Any]]] = {}  # likewise
        said: list[str | None] = []
        advice = [] if done else self.advisor.start()
        if done:
            whole = done - 1 if unwritten.evaluation_due else done
            said += self.metrics.resume(whole, unwritten.complete_rows)
            unwritten.rows = unwritten.rows[-1:] if unwritten.evaluation_due else []
            if branch:
                said.append(abandon_after(run.checkpoints, done))
                said.append(self.completions_log.drop_after(done + sampled_ahead))
                said.append(self.evaluations_log.drop_after(whole))
                said.append(self.held_out_log.drop_after(done))
                said.append(self.drift_log.drop_after(done))
            for row in read_metrics(run.metrics):
                self.advisor.observe(row)  # it said all this before the run was interrupted
        place = Place(
            run_name=config.run_name or run.path.name,
            named=config.run_name is not None,
            project=config.project,
            directory=run.trackers,
            logging_dir=Path(config.logging_dir).expanduser() if config.logging_dir else None,
            steps=done,
            more={"trackio": {"space_id": config.trackio_space_id}},
        )
        self.trackers = Trackers(config.report_to, place, settings)
        stack.callback(self.trackers.close)
        self.display = stack.enter_context(
            Display(
                total_steps,
                plan_line=plan_line,
                first_step=done,
                shows=shows,
                panel=not config.disable_tqdm,
            )
        )
        self.display.advice([], [], self.advisor.current)
        self.progress: Progress = rollout_progress(self.display)
        for fact in (*run_facts(), plan_line):
            log.info(fact)
        for text in said:
            if text is not None:
                self.display.note(text)
        for note in advice:
            self.display.note(note.text)
        self.callbacks: list[Callback] = [
            self.trackers,
            self.display,
            ShownAdvice(self.advisor, self.display),
        ]
        if config.log_completions:
            self.callbacks.append(
                ShownCompletions(
                    self.display, config.num_completions_to_print, config.log_completions_steps
                )
            )
        self.user_callbacks = callbacks  # itself: the user may add to it
        self.live_report = LiveReport(run.path, run.report)
        self._reported = False

    @classmethod
    @contextmanager
    def opened(cls, config: GRPOConfig, *, resume: bool, **rest: Any) -> Iterator[RunLogger]:
        """Lock the output directory, open everything, and close it again whatever happens."""
        with (
            RunDir.open(
                config.output_dir, overwrite=config.overwrite_output_dir, resume=resume
            ) as run,
            ExitStack() as stack,
        ):
            with writing_to(run.path):
                outputs = cls(config, run, stack, **rest)
            try:
                yield outputs
            finally:
                outputs._report_at_the_end()

    def _report_at_the_end(self) -> None:
        """The page of a run that did not come to ``finish``, unless its directory is gone, or that
        of another run by now."""
        if not self._reported:
            with suppress(OutputDirError):
                self.run.check()
                self.live_report.last()

    def write(self, unwritten: Unwritten, step: int, *, insist: bool = False) -> None:
        """Write what is not written yet; see ``Refusals`` for what fails."""

        def work() -> None:
            _write_all(self._answers, self.held_out_log)
            _write_all(self._drifts, self.drift_log)
            _write_all(unwritten.completions, self.completions_log)
            _write_all(unwritten.evaluations, self.evaluations_log)
            for row in unwritten.complete_rows:
                self.metrics.append(row)
                del unwritten.rows[0]

        self.writing("metrics and completions", step, work, insist=insist)
        for folder in (self.completions_log, self.evaluations_log):
            if (why := folder.fold_if_due()) is not None:
                log.warning("%s", why)  # nothing is lost: no reason to end a run
        self.live_report.after_step()

    def writing(
        self, what: str, step: int, work: Callable[[], T], *, insist: bool = False
    ) -> T | None:
        """The result of ``work``, which writes; None if the disk would not take it, for once: see
        ``Refusals``."""
        return self.refusals.writing(what, step, work, insist=insist)

    def unsynced_rows(self) -> list[Row]:
        """The rows that may not be on the disk, after an attempt to bring them there."""
        try:
            self.metrics.sync()
        except OSError as error:
            log.warning("%s may not be on the disk yet: %s", self.metrics.path, error)
        return list(self.metrics.unsynced)

    def tell(self, *events: tuple[Any, ...]) -> None:
        """Call every callback: the method that each event begins with, with the rest of it. Ours
        come first; the user's get copies."""
        for callback in self.callbacks:
            for event, *arguments in events:
                getattr(callback, event)(*arguments)
        for callback in list(self.user_callbacks):
            for event, *arguments in events:
                getattr(callback, event)(*copy.deepcopy(arguments))

    def evaluated_first(self, metrics: Mapping[str, Any]) -> None:
        """Keep the evaluation before the first step, as the row of step 0."""
        row = {"step": 0, **metrics}
        self.writing("the first evaluation", 0, lambda: self.metrics.append(row), insist=True)
        reward = metrics.get("eval_reward")
        shown = f"{reward:.4g}" if isinstance(reward, float) else str(reward)
        self.display.note(f"Before the first step: eval_reward {shown}.")
        self.tell(("on_evaluate", 0, metrics))

    def lacks_answers(self, step: int) -> bool:
        """Whether the answers to held-out prompts after ``step`` are still to be written."""
        return not self.held_out_log.path_of(step).exists()

    def answered(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the most likely answers to held-out prompts after ``step``."""
        self._answers[step] = records
        self.writing(
            "answers to held-out prompts",
            step,
            lambda: _write_all(self._answers, self.held_out_log),
        )
        rewards = [value for record in records if (value := finite(record["reward"])) is not None]
        when = f"After step {step}" if step else "Before the first step"
        mean = number(fmean(rewards) if rewards else None)
        self.display.note(f"{when}, {len(records)} held-out prompts, greedily: reward {mean}.")

    def drifted(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Write what the update of ``step`` did to the log-probs of a few of its completions."""
        self._drifts[step] = records
        self.writing(
            "log-probs before and after", step, lambda: _write_all(self._drifts, self.drift_log)
        )

    def skipped_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """List the data rows that were left out, beside the metrics."""
        if rows:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            with writing_to(self.run.path):
                self.run.skipped_rows.write_text("".join(lines), encoding="utf-8")

    def dump(self, step: int, samples: Sequence[TrainingSample], **facts: Any) -> Path:
        """Write the samples of a step that went wrong; returns the file's path."""
        path = self.run.nonfinite / f"step-{step:06d}.json"
        try:
            return dump_samples(path, samples, **facts)
        except OSError as error:  # it would be good to have, and is not worth the run
            log.warning("%s could not be written: %s", path, error)
            return path

    def finish(self, save_model: Callable[[Path], Path]) -> None:
        """The trained weights, the plots and the report."""
        self.display.phase("saving weights, plots and report")
        with writing_to(self.run.path):
            where = save_model(self.run.path)
            if rows := read_metrics(self.run.metrics):
                write_report(self.run.path, self.run.report)  # which draws the plots, too
                self._reported = True
                self.display.ends_with(rows)
        self.display.advice([], self.advisor.current, [])
        self.display.note(f"Done. Weights: {where}. Report: {self.run.report}.")
        self.tell(("on_end", self.run.path))
