"""Everything that a run shows and writes beside its checkpoints."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from fusedgrpo.engine.advice import Advisor
from fusedgrpo.engine.completions_log import CompletionsLog
from fusedgrpo.engine.config import GRPOConfig
from fusedgrpo.engine.display import Display
from fusedgrpo.engine.metrics import MetricsLog, read_metrics
from fusedgrpo.engine.report import write_report
from fusedgrpo.engine.rundir import RunDir
from fusedgrpo.engine.samples import Sample, dump_samples
from fusedgrpo.engine.sinks import Sinks

log = logging.getLogger("fusedgrpo")


class _NoDisplay:
    """A ``Display`` that nobody sees."""

    def phase(self, name: str) -> None: ...
    def note(self, text: str) -> None: ...


class RunOutputs:
    """One run's directory, metrics, display, trackers and advice; open it with ``opened``."""

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
    ):
        self.config = config
        self.run = run
        settings = config.to_record()
        run.config.write_text(
            yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8"
        )
        self.metrics = stack.enter_context(MetricsLog(run.metrics))
        self.advisor = Advisor(settings, eos_token_ids=eos_ids)
        if done:
            self.metrics.truncate_after(done)
            self.advisor.start()
            for row in read_metrics(run.metrics):
                self.advisor.observe(row)  # it said all this before the run was interrupted
        self.sinks = Sinks(
            config.report_to,
            run_name=config.run_name or run.path.name,
            directory=run.trackers,
            config=settings,
        )
        stack.callback(self.sinks.close)
        self.completions_log = CompletionsLog(run.completions)
        self.display = stack.enter_context(
            Display(
                total_steps,
                plan_line=plan_line,
                logging_steps=config.logging_steps,
                first_step=done,
            )
        )
        log.info(plan_line)
        for line in self.advisor.start():
            self.display.note(line)

    @classmethod
    @contextmanager
    def opened(cls, config: GRPOConfig, *, resume: bool, **rest: Any) -> Iterator[RunOutputs]:
        """Lock the output directory, open everything, and close it again whatever happens."""
        with (
            RunDir.open(
                config.output_dir, overwrite=config.overwrite_output_dir, resume=resume
            ) as run,
            ExitStack() as stack,
        ):
            yield cls(config, run, stack, **rest)

    def row(self, row: dict[str, Any]) -> None:
        """One optimizer step is done: write it, show it, say what a reader should know."""
        self.metrics.append(row)
        self.sinks.log(row)
        self.display.update(row["step"], row)
        for line in self.advisor.observe(row):
            self.display.note(line)

    def completions(self, step: int, records: list[dict[str, Any]]) -> None:
        """Write the completions of one rollout and show some if the user wants to see them."""
        self.completions_log.write(step, records)
        if self.config.log_completions:
            limit = self.config.num_completions_to_print
            self.display.completions(step, records[:limit])

    def skipped_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """List the data rows that were left out, beside the metrics."""
        if rows:
            lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            self.run.skipped_rows.write_text("".join(lines), encoding="utf-8")

    def dump(self, step: int, samples: Sequence[Sample], **facts: Any) -> Path:
        """Write the samples of a step that went wrong; returns the file's path."""
        path = self.run.path / "nonfinite" / f"step-{step:06d}.json"
        return dump_samples(path, samples, **facts)

    def finish(self, save_model: Callable[[Path], Path]) -> None:
        """The trained weights, the plots and the report."""
        where = save_model(self.run.path)
        if read_metrics(self.run.metrics):
            write_report(self.run.path, self.run.report)  # which draws the plots, too
        self.display.note(f"Done. Weights: {where}. Report: {self.run.report}.")


class NoOutputs(RunOutputs):
    """The outputs of every process but the first: nothing is locked, shown or written."""

    def __init__(self) -> None:
        self.display = _NoDisplay()  # type: ignore[assignment]

    @classmethod
    @contextmanager
    def opened(cls, config: GRPOConfig, *, resume: bool, **rest: Any) -> Iterator[RunOutputs]:
        yield cls()

    def row(self, row: dict[str, Any]) -> None: ...
    def completions(self, step: int, records: list[dict[str, Any]]) -> None: ...
    def skipped_rows(self, rows: Sequence[dict[str, Any]]) -> None: ...
    def finish(self, save_model: Callable[[Path], Path]) -> None: ...

    def dump(self, step: int, samples: Sequence[Sample], **facts: Any) -> Path:
        return Path(f"step-{step:06d}.json")
