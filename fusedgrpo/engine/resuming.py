"""A trainer's state: what of it is saved, and how it becomes what was saved."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpoint_files, checkpointing, metric_schedule
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.callback_events import CallbackEvents
from fusedgrpo.engine.checkpointer import Checkpointer
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.data.held_out import HeldOut, encoded_again
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.optimizer import build_scheduler
from fusedgrpo.engine.planned_work import follow_plan
from fusedgrpo.engine.reporting.metrics_log import Row
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.sampler import Sampler
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.engine.run_sampler import RunSampler
from fusedgrpo.engine.same_run import RunIdentity
from fusedgrpo.errors import CheckpointError
from fusedgrpo.models.policy import Policy


class Resuming:
    """``state_dict`` and ``load_state_dict`` of a trainer, and what goes with them."""

    args: GRPOConfig
    policy: Policy
    plan: BatchPlan
    run_control: RunControl
    clock: RunClock
    processes: Processes
    data: PromptDataset
    held_out: HeldOut | None
    stream: PromptStream
    learner: Learner
    run_sampler: RunSampler
    sampler: Sampler
    progress: Progress
    unwritten: Unwritten
    buffer: RolloutBuffer | None
    checkpointer: Checkpointer
    events: CallbackEvents
    scheduler_is_given: bool

    def set_clock(self, started: datetime) -> None:
        """Go on with the prompts of a run that was started at another time. Raises DataError."""
        self.clock.started = started
        self.data = self.stream.data = self.data.encoded_again()
        self.held_out = encoded_again(self.held_out)

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """The memory that the run needs of its card, where there is one or one was named."""
        return self.run_sampler.memory_plan

    @property
    def identity(self) -> RunIdentity:
        return RunIdentity(
            self.args, self.policy.precision, self.data, self.plan, self.processes.size
        )

    def state_dict(self, unsynced: Sequence[Row] = ()) -> dict[str, Any]:
        """The state after the last completed step, without the weights. ``state``: plain values;
        ``optimizer``: tensors; ``window``: tensors and values of an unfinished rollout, or None.
        As in torch, tensors are those that the next step changes: copy what is to be kept.

        unsynced: rows of metrics that are written, and would be lost if the machine stopped now.
        """
        window = self.buffer if self.buffer and not self.buffer.finished else None
        tensors, values = checkpoint_files.optimizer_state(self.learner.optimizer)
        state = {
            "progress": dataclasses.asdict(self.progress),
            "optimizer": values,
            "scaler": self.learner.scaler.state_dict(),
            "started": self.clock.started.isoformat(),
            "unwritten": self.unwritten.state(unsynced),
            "callbacks": self.events.saved(),
            "window": window is not None,
            "rollout_weights": self.run_sampler.weights,
            "best": self.run_control.to_record(),
            "schedule": metric_schedule.state(self.learner.scheduler),
            "entropy_bonus": self.learner.bonus.state(),
            "selection": self.stream.state(),
            **self.identity.to_record(),
        }
        if self.scheduler_is_given:
            state["scheduler"] = self.learner.scheduler.state_dict()
            state["learning_rates"] = [g["lr"] for g in self.learner.optimizer.param_groups]
        window_state = None if window is None else window.state()
        return {"state": state, "optimizer": tensors, "window": window_state}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` gave; the weights, which are put back before, and whether it
        is the same run, are the caller's. Raises CheckpointError."""
        state, window = saved["state"], saved["window"]
        with self.checkpointer.loading("a state_dict"):
            checkpoint_files.load_optimizer_state(
                self.learner.optimizer, saved["optimizer"], state["optimizer"]
            )
            self.learner.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
            self.run_control.restore(state.get("best"))
            metric_schedule.restore(self.learner.scheduler, state.get("schedule"))
            self.learner.bonus.restore(state.get("entropy_bonus"))
            self.stream.restore(state.get("selection"))
            self.unwritten = Unwritten()
            if "unwritten" in state:  # else it is of version 0.1
                self.unwritten = Unwritten.from_state(copy.deepcopy(state["unwritten"]))
            self.buffer = None if window is None else RolloutBuffer.from_state(*window)
            self._follow_progress()
            if self.scheduler_is_given:
                self._restore_schedule(state)
            self.events.restore(copy.deepcopy(state.get("callbacks")))
            # Versions before had no choice to keep.
            other = self.run_sampler.go_on_with(state.get("rollout_weights"))
            if other is not None:
                self.sampler = other
                follow_plan(self.args, self.memory_plan, self.learner)
        self.sampler.weights_changed()

    def _restore_schedule(self, state: Mapping[str, Any]) -> None:
        """Put back the user's schedule. Raises CheckpointError where the run had none."""
        if "scheduler" not in state:
            raise CheckpointError(
                "The checkpoint is of a run without a scheduler in optimizers: leave it out."
            )
        self.learner.scheduler.load_state_dict(state["scheduler"])
        groups = self.learner.optimizer.param_groups
        for group, rate in zip(groups, state["learning_rates"], strict=True):
            group["lr"] = rate

    def _follow_progress(self) -> None:
        """Prompts and learning rate go on from the last completed step."""
        self.stream.cursor = self.progress.cursor
        if self.scheduler_is_given:
            return  # it is where its own state says
        self.learner.scheduler = build_scheduler(
            self.args,
            self.learner.optimizer,
            self.plan.total_steps,
            self.progress.step,
            self.learner.scheduler,
        )

    def _restore(self, path: Path) -> None:
        """Become what was saved in the checkpoint ``path``. Raises CheckpointError."""
        state = checkpointing.read_state(path)
        if "started" in state:  # else it is of version 0.1
            self.set_clock(datetime.fromisoformat(state["started"]))
        self.identity.check(state, path)
        with self.checkpointer.loading(path):
            checkpointing.load_weights(self.policy, path)
            self.load_state_dict(checkpointing.read(path, state))
