"""transformers' callbacks: called at their moments, in every process, with state and control."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.reporting.metrics_log import to_json_line
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.engine.step_means import StepMeans
from fusedgrpo.errors import ConfigError

_FLAGS = (
    "should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log",
)  # fmt: skip


class Watched(Protocol):
    """The parts of a trainer that callbacks are given."""

    args: GRPOConfig
    processing_class: Any
    processes: Processes
    progress: Progress
    plan: BatchPlan
    run_control: RunControl
    stream: PromptStream
    buffer: RolloutBuffer | None
    learner: Learner

    @property
    def model(self) -> Any: ...


class DefaultFlow(DefaultFlowCallback):
    """The run's own answers to when it logs, evaluates and saves, given before the user's."""

    def __init__(self, control: RunControl):
        self.run_control = control

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step, run = state.global_step, self.run_control
        control.should_log |= run.logs(step)
        control.should_evaluate |= run.evaluates(step)
        control.should_training_stop |= step >= state.max_steps
        return control

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        return control  # an epoch ends with a step, which is asked about


class CallbackEvents:
    """Tells transformers' callbacks what happens in a trainer, and keeps what they say.

    state: always current; control: what they asked for, the same in every process: what one of
    them asks for in one process happens in all. handler: transformers' own, with the default flow
    as its first callback; without that callback, nothing is logged, evaluated or saved but on
    demand, as in transformers. means: of the steps since the last log.
    """

    def __init__(self, trainer: Watched, callbacks: Sequence[TrainerCallback]):
        self.trainer = trainer
        self.control = TrainerControl()
        self.means = StepMeans()
        run, plan = trainer.run_control, trainer.plan
        self.flow = DefaultFlow(run)
        self.state = TrainerState(
            max_steps=plan.total_steps,
            num_train_epochs=plan.epochs,
            train_batch_size=trainer.args.per_device_train_batch_size,
            logging_steps=run.logging_steps,
            eval_steps=run.eval_steps,
            save_steps=run.save_steps,
            is_world_process_zero=trainer.processes.is_main,
            is_local_process_zero=trainer.args.local_process_index == 0,
        )
        self.handler = CallbackHandler(
            [self.flow, *callbacks], trainer.model, trainer.processing_class, None, None
        )
        self._muted = False
        self._epoch: int | None = None  # whose begin was told, and whose end was not
        self.fire("on_init_end")

    def fire(self, event: str, **arguments: Any) -> None:
        """Call ``event`` of every callback, in all processes together."""
        if self._muted:
            return
        trainer, handler = self.trainer, self.handler
        handler.model = trainer.model
        handler.optimizer = trainer.learner.optimizer
        handler.lr_scheduler = trainer.learner.scheduler
        told = trainer.processes.run_everywhere(
            lambda: getattr(handler, event)(trainer.args, self.state, self.control, **arguments)
        )
        self.control = told[trainer.processes.rank]
        for flag in _FLAGS:
            setattr(self.control, flag, any(getattr(control, flag) for control in told))

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Inside, nobody is called, and the default flow alone says what to do."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    # --- the run ------------------------------------------------------------------------------

    def follow(self) -> None:
        """Bring the state up to the trainer's counters."""
        progress, run = self.trainer.progress, self.trainer.run_control
        for name in ("best_metric", "best_global_step", "best_model_checkpoint"):
            value = getattr(run, name, None)
            setattr(self.state, name, str(value) if isinstance(value, Path) else value)
        self.state.global_step = progress.step
        self.state.num_input_tokens_seen = progress.num_tokens
        self.state.epoch = self.trainer.stream.epoch

    def begin_training(self) -> None:
        self._check_states()
        self.follow()
        self.fire("on_train_begin")

    def begin_step(self) -> None:
        """Before a step, and before the epoch that it begins."""
        if self._epoch is None:
            self._epoch = self._epochs_behind()
            self.control.should_epoch_stop = False
            self.fire("on_epoch_begin")
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.fire("on_step_begin")

    def end_step(self) -> None:
        """After a step was counted."""
        if self._muted:
            self.flow.on_step_end(self.trainer.args, self.state, self.control)
        self.fire("on_step_end")

    @property
    def saves(self) -> bool:
        """Whether to save after the step: asked last, for the best of all evaluations may be the
        one of this step."""
        flows = self._muted or self.flow in self.handler.callbacks
        due = flows and self.trainer.run_control.saves(self.state.global_step)
        return due or self.control.should_save

    def epoch_ends(self, last: bool) -> bool:
        """Whether the epoch is over after the step that was done last: its prompts were trained on,
        or a callback has stopped it or the run, or the run is over (``last``)."""
        control = self.control
        stopped = control.should_epoch_stop or control.should_training_stop
        return self._epoch is not None and (stopped or last or self._epochs_behind() > self._epoch)

    def end_epoch(self) -> int:
        """After the last step of an epoch; returns the prompts that are behind at the end of it."""
        assert self._epoch is not None
        behind = (self._epoch + 1) * len(self.trainer.stream.data)
        self._epoch = None
        self.fire("on_epoch_end")
        return behind

    def _epochs_behind(self) -> int:
        """How often the data was trained on. Each step trains on an equal part of its rollout."""
        stream, buffer = self.trainer.stream, self.trainer.buffer
        behind = Fraction(stream.cursor)
        if buffer is not None:
            steps = buffer.steps * buffer.iterations
            behind -= Fraction(len(buffer.rollout.groups) * (steps - buffer.done), steps)
        return int(behind // len(stream.data))

    # --- the log ------------------------------------------------------------------------------

    def log(self, logs: dict[str, Any]) -> None:
        """Add ``logs`` to the history, with epoch and step, and tell the callbacks."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.fire("on_log", logs=logs)
        self.control.should_log = False

    # --- checkpoints --------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        """JSON values from which ``restore`` goes on."""
        state = self.state
        state.stateful_callbacks = TrainerState(
            stateful_callbacks=self._stateful()
        ).stateful_callbacks
        values = {
            "log_history": state.log_history,
            "stateful_callbacks": state.stateful_callbacks,
            "means": self.means.state(),
            "epoch": self._epoch,
        }
        read: dict[str, Any] = json.loads(to_json_line(values))
        return read

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from ``saved``; None is of a version that had none of it. Callbacks that keep a
        state get theirs back by the name of their class, as far as they are there."""
        self.follow()
        saved = dict(saved or {})
        self.means = StepMeans.from_state(saved["means"]) if "means" in saved else StepMeans()
        self._epoch = saved.get("epoch")
        self.state.log_history = list(saved.get("log_history", []))
        states = saved.get("stateful_callbacks", {})
        for index, callback in enumerate(self.handler.callbacks):
            found = states.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and found:
                own = found.pop(0) if isinstance(found, list) else found
                self.handler.callbacks[index] = _restored(callback, own)

    def _stateful(self) -> list[Any]:
        return [c for c in self.handler.callbacks if isinstance(c, ExportableState)]

    def _check_states(self) -> None:
        """Raise ConfigError for a callback whose state no checkpoint can hold."""
        for callback in self._stateful():
            try:
                json.dumps(callback.state())  # type: ignore[no-untyped-call]
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"callbacks: {type(callback).__name__}.state() goes into checkpoints, which "
                    f"hold JSON, and cannot: {error}. Return numbers, texts, lists and dicts."
                ) from error


def _restored(callback: Any, saved: Mapping[str, Any]) -> Any:
    """``callback`` with the state that was saved; its arguments stay those that it was made with,
    unless its class reads states in a way of its own."""
    kind = type(callback)
    if kind.from_state.__func__ is not ExportableState.from_state.__func__:  # type: ignore[attr-defined]
        return kind.from_state(saved)
    for name, value in saved["attributes"].items():
        setattr(callback, name, value)
    return callback
