"""When the state of a trainer is whole, and how it gets to the disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpoint_files as checkpoint
from fusedgrpo.engine.checkpointing import (
    Progress,
    load_weights,
    missing_file,
    save,
    save_reference,
    save_weights,
)
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.interrupts import Interrupted, StopSignals
from fusedgrpo.engine.reporting.metrics_log import Row
from fusedgrpo.engine.reporting.run_logger import RunLogger
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rollout.sampler import Sampler
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.errors import CheckpointError, NonFiniteError, OutputDirError
from fusedgrpo.models.finite import not_finite
from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")


class Checkpointed(Protocol):
    """The parts of a trainer that its checkpoints are about."""

    args: GRPOConfig
    policy: Policy
    processing_class: Any
    processes: Processes
    signals: StopSignals
    progress: Progress
    run_control: RunControl
    sampler: Sampler
    unwritten: Unwritten

    def state_dict(self, unsynced: Sequence[Row] = ()) -> dict[str, Any]: ...


class Checkpointer:
    """Saves the checkpoints of a trainer, and never one of half a step.

    torn: in what an error has left the trainer's state half changed; None while it is that of a
    completed step.
    """

    def __init__(self, trainer: Checkpointed):
        self.trainer = trainer
        self.torn: str | None = None
        self._overdue = False
        self._change: ExitStack | None = None

    @contextmanager
    def one_change(self, what: str) -> Iterator[None]:
        """Around something that, once it ``begins``, must be done whole: signals wait for its end,
        and after an error in it there is no state to save."""
        with ExitStack() as self._change:
            self._what = what
            yield
            self.torn = None

    def begins(self) -> None:
        """From here to the end of ``one_change`` the state is half changed."""
        assert self._change is not None
        self._change.enter_context(self.trainer.signals.held())
        self.torn = self._what

    @contextmanager
    def loading(self, source: Path | str) -> Iterator[None]:
        """Around the loading of a state: after an error in it the trainer is no one's."""
        self.torn = f"the loading of {source}"
        yield
        self.torn = None

    def check_whole(self) -> None:
        """Raise CheckpointError if there is no state to go on from."""
        if self.torn is not None:
            raise CheckpointError(
                f"An error in {self.torn} has left this trainer with half a change. Give "
                "resume_from_checkpoint, or make a new trainer."
            )

    def save(
        self, outputs: RunLogger, *, prune: bool = True, only_model: bool = False
    ) -> Path | None:
        """Write a checkpoint of the last completed step. Raises what the disk says, CheckpointError
        and NonFiniteError."""
        trainer = self.trainer
        if not trainer.processes.is_main:
            return None
        self.check_whole()
        outputs.run.check()
        if problem := not_finite(trainer.policy.trainable()):
            raise NonFiniteError(f"The weights after step {trainer.progress.step}: {problem}.")
        path = save(
            outputs.run.checkpoints,
            trainer.state_dict(outputs.unsynced_rows()),
            lambda path: self._write_weights(path, only_model),
            only_model=only_model,
        )
        self._overdue = False
        log.info("Checkpoint: %s", path)
        if prune and trainer.args.save_total_limit:
            best = trainer.run_control.best_model_checkpoint
            checkpoint.prune(outputs.run.checkpoints, trainer.args.save_total_limit, path, best)
        return path

    def _write_weights(self, path: Path, only_model: bool) -> None:
        trainer = self.trainer
        save_weights(trainer.policy, trainer.processing_class, path)
        if trainer.args.sync_ref_model and not only_model:
            save_reference(trainer.policy, path)

    def save_if_due(self, outputs: RunLogger, due: bool, *, insist: bool = False) -> Path | None:
        """Save if it is ``due``, or if the disk would not take it the last time; returns where."""
        self._overdue |= due
        if self._overdue and self.trainer.processes.is_main:
            return outputs.writing(
                "the checkpoint",
                self.trainer.progress.step,
                lambda: self.save(outputs, only_model=self.trainer.args.save_only_model),
                insist=insist,
            )
        return None

    def settle(self, outputs: RunLogger) -> None:
        """The run is at its end: what the disk would not take before, it has to take now. Its last
        step has a checkpoint, so that it can be extended."""
        step = self.trainer.progress.step
        outputs.write(self.trainer.unwritten, step, insist=True)
        wanted = outputs.writes and self.trainer.args.save_strategy in ("steps", "epoch")
        there = wanted and checkpoint.of_step(outputs.run.checkpoints, step).exists()
        self.save_if_due(outputs, wanted and not there, insist=True)

    def load_best(self, outputs: RunLogger) -> None:
        """The run is at its end: with ``load_best_model_at_end`` the weights become those of the
        best evaluation. Where its checkpoint is gone they stay the last ones, and that is said."""
        trainer, control = self.trainer, self.trainer.run_control
        if not trainer.args.load_best_model_at_end:
            return
        best = control.best
        said = f"Best by {control.metric_name}"
        if best is None:
            log.warning("%s: no evaluation was finite. The weights are the last ones.", said)
            return
        said += f": {best.metric:.4g}, after step {best.step}"
        if best.step == trainer.progress.step:
            outputs.display.note(f"{said}, the last one.")
            return
        path = trainer.processes.run_on_main(self._best_checkpoint)
        if path is None:
            log.warning("%s. Its checkpoint is gone: the weights are the last ones.", said)
            return
        with self.loading(path):
            load_weights(trainer.policy, path)
        trainer.sampler.weights_changed()
        outputs.display.note(f"{said}: the weights are those of {path}.")

    def _best_checkpoint(self) -> Path | None:
        path = self.trainer.run_control.best_model_checkpoint
        try:
            if path is not None:
                checkpoint.verify(path)
        except CheckpointError as error:
            log.warning("%s", error)
            return None
        return path

    @contextmanager
    def saved_if_it_ends(self, outputs: RunLogger) -> Iterator[None]:
        """Whatever ends the run early, its last completed step is saved first, if it is whole."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, Interrupted):
                error.said = True
            said = self._save_at_the_end(error, outputs)
            outputs.display.note(f"{_reason(error)} {said}")
            if isinstance(error, NonFiniteError):
                raise NonFiniteError(f"{error} {said}") from error
            raise

    def _save_at_the_end(self, error: BaseException, outputs: RunLogger) -> str:
        """Save; returns what became of it."""
        trainer = self.trainer
        step = trainer.progress.step
        if self.torn is not None:
            return (
                f"in {self.torn}, after step {step}: half a step is nothing to go on from and was "
                f"not saved. {self._last_good(outputs)}"
            )
        if not step:
            return "before the first step was done: there is nothing to go on from."
        with suppress(OutputDirError):  # then it is in the checkpoint, or that says why not
            outputs.write(trainer.unwritten, step)
        try:
            # The weights may be what is wrong: the ones before them must not make room.
            path = self.save(outputs, prune=not isinstance(error, NonFiniteError))
        except Exception as failure:  # noqa: BLE001  said, beside the error that ends the run
            return f"after step {step}, not saved: {_reason(failure)}. {self._last_good(outputs)}"
        return f"after step {step}. Saved {path}; go on with resume_from_checkpoint: auto."

    def _last_good(self, outputs: RunLogger) -> str:
        if not self.trainer.processes.is_main:
            return ""
        path = checkpoint.newest_valid(outputs.run.checkpoints, missing_file)
        if path is None:
            return "There is no checkpoint to go on from."
        return f"The last good checkpoint is {path}; go on with resume_from_checkpoint: auto."


def _reason(error: BaseException) -> str:
    if isinstance(error, Interrupted):
        return f"Stopped by {error.signal_name}"
    return f"{type(error).__name__}: {error}".split("\n")[0].rstrip(".")
