"""``GRPOTrainer``: prompts and reward functions in; a trained adapter, metrics and a report out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpoint_files, checkpointing, metric_schedule, nonfinite
from fusedgrpo.engine.callbacks import check_callbacks
from fusedgrpo.engine.checkpointer import Checkpointer
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.collector import Collector
from fusedgrpo.engine.data.dataset import Example, load_prompts
from fusedgrpo.engine.evaluation import evaluate
from fusedgrpo.engine.learner import UpdateResult
from fusedgrpo.engine.memory.plan import MemoryPlan, measured_phases, plan_table
from fusedgrpo.engine.metric_names import merged
from fusedgrpo.engine.optimizer import build_scheduler
from fusedgrpo.engine.reporting.metrics_log import Row
from fusedgrpo.engine.reporting.phase_timer import PhaseTimer
from fusedgrpo.engine.reporting.run_logger import NoLogger, RunLogger
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.engine.same_run import RunIdentity
from fusedgrpo.engine.seeding import derive
from fusedgrpo.engine.setup import all_examples, build_parts, describe, follow_plan
from fusedgrpo.engine.trl_surface import METHODS, TRLSurface, refuse_arguments
from fusedgrpo.engine.warmup import warm_up
from fusedgrpo.errors import ConfigError, NonFiniteError
from fusedgrpo.models import missing_backward
from fusedgrpo.models.finite import not_finite
from fusedgrpo.models.settings import model_limits


class GRPOTrainer(TRLSurface):
    """Trains a causal language model with GRPO. Arguments and behaviour follow ``trl.GRPOTrainer``.

    model: a name or path, of a model or of an adapter; a transformers model; or a peft model; None
        for ``args.model_name_or_path``. An adapter that is there is trained further, else LoRA is
        added (``finetuning_type: full`` trains all weights). Frozen weights of one that is given
        keep their dtype. reward_funcs: names, callables, reward models, or a list of these; None
        for ``args.reward_funcs``. args: a ``GRPOConfig``, or TRL's, which is translated.
    train_dataset, eval_dataset: a ``datasets.Dataset``, a list of dicts, or a name or path; None
        for those of ``args``. processing_class, or tokenizer: the tokenizer, or a Processor that
        has one, if not the model's.
    quantization_config, peft_config: of bitsandbytes and peft, instead of what ``args`` describes.
    callbacks: of ``fusedgrpo.Callback``, told what happens in ``train``. optimizers, tools,
    rollout_func, environment_factory: TRL's, refused with a remedy.
    sampler: another ``Sampler`` than the option ``sampler`` says, or anything that has ``sample``.
    search_paths: folders where ``file.py:name`` is looked for, beside the working directory.

    Everything that can be wrong is checked here, before the first step. Raises ConfigError,
    DataError, RewardError, ModelError or OutputDirError.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        tokenizer: Any = None,
        sampler: Any = None,
        search_paths: Sequence[str | Path] = (),
    ):
        refuse_arguments(
            {
                "optimizers": optimizers,
                "tools": tools,
                "rollout_func": rollout_func,
                "environment_factory": environment_factory,
            }
        )
        self.callbacks = check_callbacks(callbacks)
        parts = build_parts(
            args,
            model,
            reward_funcs,
            train_dataset,
            eval_dataset,
            tokenizer if processing_class is None else processing_class,
            reward_processing_classes=reward_processing_classes,
            quantization_config=quantization_config,
            peft_config=peft_config,
            sampler=sampler,
            search_paths=search_paths,
        )
        self.args = parts.args
        self.execution = parts.execution
        self.processes = parts.execution.processes
        self.signals = parts.execution.signals
        self.processing_class = parts.processing_class
        self.tokenizer = parts.tokenizer
        self.clock = parts.clock
        self.formats = parts.formats
        self.reward_funcs = parts.reward_funcs
        self.train_dataset = parts.train_dataset
        self.eval_dataset = parts.eval_dataset
        self.policy = parts.policy
        self.eos_ids = parts.eos_ids
        self.plan = parts.plan
        self.stream = parts.stream
        self.learner = parts.learner
        self.estimate_advantages = parts.estimate_advantages
        self.run_sampler = parts.run_sampler
        self.sampler = parts.sampler
        self.sampling = parts.sampling
        self.progress = Progress()
        self.unwritten = Unwritten()
        self.buffer: RolloutBuffer | None = None
        self.memory_peaks: dict[str, float] = {}
        self.collector = Collector(self)
        self.run_control = RunControl(parts.args, parts.plan)
        self.checkpointer = Checkpointer(self)
        self.learner.changing = self.checkpointer.begins

    def set_clock(self, started: datetime) -> None:
        """Go on with the prompts of a run that was started at another time. Raises DataError."""
        self.clock.started = started
        self.train_dataset = self.stream.data = self.train_dataset.encoded_again()
        if self.eval_dataset is not None:
            self.eval_dataset = self.eval_dataset.encoded_again()

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """The memory that the run needs of its card, where there is one or one was named."""
        return self.run_sampler.memory_plan

    @property
    def identity(self) -> RunIdentity:
        return RunIdentity(
            self.args, self.policy.precision, self.train_dataset, self.plan, self.processes.size
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
            "window": window is not None,
            "rollout_weights": self.run_sampler.weights,
            "best": self.run_control.to_record(),
            "schedule": metric_schedule.state(self.learner.scheduler),
            "entropy_bonus": self.learner.bonus.state(),
            **self.identity.to_record(),
        }
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
            self.unwritten = Unwritten()
            if "unwritten" in state:  # else it is of version 0.1
                self.unwritten = Unwritten.from_state(copy.deepcopy(state["unwritten"]))
            self.buffer = None if window is None else RolloutBuffer.from_state(*window)
            self._follow_progress()
            # Versions before had no choice to keep.
            other = self.run_sampler.go_on_with(state.get("rollout_weights"))
            if other is not None:
                self.sampler = other
                follow_plan(self.args, self.memory_plan, self.learner)
        self.sampler.weights_changed()

    def _follow_progress(self) -> None:
        """Prompts and learning rate go on from the last completed step."""
        self.stream.cursor = self.progress.cursor
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

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> SimpleNamespace:
        """Run to the end, or from a checkpoint on; returns the last step's ``metrics``.
        ignore_keys_for_eval: TRL's; there is nothing to ignore.

        SIGINT and SIGTERM save a checkpoint and raise SystemExit with code 130 or 143, and any
        error saves one before it goes on its way: the run continues with
        ``resume_from_checkpoint``.
        """
        if trial is not None:
            raise ConfigError(f"trial: {METHODS['hyperparameter_search']}.")
        args = self.args
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else (
            resume_from_checkpoint
        )  # fmt: skip
        self._check_more_to_do()
        checkpoints = Path(args.output_dir).expanduser().absolute() / "checkpoints"
        with ExitStack() as stack:
            stack.enter_context(self.signals)
            with self.signals.at_once():
                found = self.processes.run_on_main(lambda: checkpointing.find(resume, checkpoints))
                if found is not None:
                    self._restore(found)
                self.checkpointer.check_whole()
            self._follow_progress()
            outputs = stack.enter_context(
                (RunLogger if self.processes.is_main else NoLogger).opened(
                    args,
                    resume=self.progress.step > 0,
                    total_steps=self.plan.total_steps,
                    done=self.progress.step,
                    plan_line=describe(self.policy, self.plan, self.processes),
                    eos_ids=self.eos_ids,
                    unwritten=self.unwritten,
                    branch=found is not None,
                    sampled_ahead=self.buffer is not None and self.buffer.done == 0,
                    callbacks=self.callbacks,
                    shows=self.run_control.shows,
                )
            )
            stack.enter_context(self.execution.watched(outputs.progress))
            step, total = self.progress.step, self.plan.total_steps
            if said := checkpointing.begins(found, resume, checkpoints, step, total):
                outputs.display.note(said)
            outputs.skipped_rows(self.train_dataset.skipped)
            if self.memory_plan is not None:
                outputs.display.note(f"Memory, planned:\n{plan_table(self.memory_plan)}")
            if args.rehearsal or (args.rehearsal is None and self.policy.device.type == "cuda"):
                outputs.display.note(self.warm_up())
            row: dict[str, Any] = {}
            with self.checkpointer.saved_if_it_ends(outputs), missing_backward.refused():
                outputs.write(self.unwritten, self.progress.step)
                if self.unwritten.evaluation_due:
                    row = self._finish_row(outputs)
                elif found is not None and found.resolve().parent != checkpoints.resolve():
                    # The run's own checkpoints are of another run, if there are any.
                    self.checkpointer.save_if_due(outputs, args.save_strategy != "no")
                if self.run_control.evaluates_first(self.progress.step):
                    outputs.evaluated_first(self.evaluate())
                while self.progress.step < self.plan.total_steps:
                    row = self.step(outputs)
                self.checkpointer.settle(outputs)
            self.checkpointer.load_best(outputs)
            measured = measured_phases(self.memory_peaks)
            if self.memory_plan is not None and measured:
                table = plan_table(self.memory_plan, measured)
                outputs.display.note(f"Memory, planned and measured:\n{table}")
            outputs.finish(self._save_into)
        return SimpleNamespace(
            global_step=self.progress.step, training_loss=row.get("loss"), metrics=row
        )

    def warm_up(self) -> str:
        """Hold the memory that the largest rollout and update will take; says what was found.

        What does not fit is halved, for the rest of the run. Raises MemoryExhaustedError.
        """
        window = self.plan.steps_per_rollout * self.plan.num_iterations > 1
        share = self.processes.size
        said = self.processes.run_everywhere(
            lambda: warm_up(
                self.learner,
                self.sampler,
                self.sampling,
                prompt_lengths=[
                    len(example.prompt_ids)
                    for example in all_examples(self.train_dataset, self.eval_dataset)
                ],
                n=self.args.num_generations,
                groups_per_step=-(-self.plan.groups_per_step // share),
                groups_per_rollout=-(-self.plan.groups_per_rollout // share),
                keeps_old=window or self.args.sampler_correction,
                seed=self.args.seed,
            )
        )
        return " ".join(
            text if len(said) == 1 else f"Process {rank}: {text}" for rank, text in enumerate(said)
        )

    def step(self, outputs: RunLogger | None = None) -> dict[str, Any]:
        """One optimizer step; returns its metrics. Without ``outputs``, which ``train`` opens,
        nothing is shown or written, and no callback is called."""
        self._check_more_to_do()
        self.checkpointer.check_whole()
        outputs = outputs or NoLogger()
        timer = PhaseTimer(outputs.display.phase, on_gpu=self.policy.device.type == "cuda")
        if self.buffer is None or self.buffer.finished:
            examples = self.collector.prompts()
            with timer.phase("sample"):
                rollout = self.collector.sample(examples)
            with timer.phase("score"):
                rewards = self.collector.score(rollout, examples)
                buffer = self.collector.buffer(rollout, rewards)
            self._take(buffer, rewards, examples, outputs)
        assert self.buffer is not None
        samples = self.buffer.next_samples(mask_truncated=self.args.mask_truncated_completions)
        with self.checkpointer.one_change(f"the update of step {self.progress.step + 1}"):
            with timer.phase("update"):
                result = self.learner.step(samples, self.progress.step)
            self._accept(result, samples, outputs, timer)
        if result.applied:
            self.processes.run_everywhere(self.sampler.weights_changed)
        self._measure(self.unwritten.rows[-1])
        row = self._finish_row(outputs)
        due = outputs.writes and self.run_control.saves(self.progress.step)
        self.checkpointer.save_if_due(outputs, due)
        self.processes.run_everywhere(self.execution.check_interrupt)
        return row

    def _check_more_to_do(self) -> None:
        if 0 < self.plan.total_steps <= self.progress.step:
            raise ConfigError("This trainer has finished its run. Make a new one to train again.")

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
        """Evaluate if the row of the last step waits for that, then write and show it."""
        row = self.unwritten.rows[-1]
        metrics: dict[str, Any] = {}
        if self.unwritten.evaluation_due:
            outputs.display.phase("evaluate")
            metrics = self.evaluate()
            compared = self.run_control.observe(self.progress.step, metrics)
            metric_schedule.observe(self.learner.scheduler, compared)
            row |= metrics
            self.unwritten.evaluation_due = False
        outputs.write(self.unwritten, self.progress.step)
        evaluated = [("on_evaluate", self.progress.step, metrics)] if metrics else []
        self.processes.run_on_main(lambda: outputs.tell(*evaluated, ("on_step", row)))
        return row

    def _take(
        self,
        buffer: RolloutBuffer,
        rewards: RewardBatch,
        examples: Sequence[Example],
        outputs: RunLogger,
    ) -> None:
        """The rollout is whole: from here on its prompts are used and its tokens counted."""
        groups = buffer.rollout.groups
        records = self.collector.records(buffer, rewards, examples)
        tokens = sum(
            len(group.prompt_ids) + len(c.ids) for group in groups for c in group.completions
        )
        with self.signals.held():
            self.buffer = buffer
            self.unwritten.completions[self.progress.step + 1] = records
            self.stream.cursor += len(groups)
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
        tokens = sum(len(sample.completion_ids) for sample in samples)
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
            self.unwritten.rows.append(merged(row, self.buffer.metrics))
            self.unwritten.evaluation_due = self.run_control.evaluates(self.progress.step)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, Any]:
        """Sample and score the evaluation prompts, or those of ``eval_dataset``; metrics with the
        prefix ``eval_``. ignore_keys: TRL's; there is nothing to ignore.

        Always from the same seeds, so that two evaluations differ by the policy alone.
        """
        held_out = self.eval_dataset
        if eval_dataset is not None:
            limits: dict[str, Any] = model_limits(self.args, self.policy.causal_lm) or {}
            held_out = load_prompts(
                eval_dataset,
                self.args,
                self.processing_class,
                split="test",
                clock=self.clock,
                formats=self.formats,
                **limits,
            )
        if held_out is None:
            raise ConfigError("There is no eval_dataset.")
        metrics = evaluate(
            held_out,
            self.sampler,
            self.reward_funcs,
            n=self.args.num_generations_eval or self.args.num_generations,
            params=self.sampling,
            batch_size=self.args.per_device_eval_batch_size,
            seed=derive(self.args.seed, "eval"),
            state=self.collector.reward_state(),
            processes=self.processes,
        )
        return {
            f"{metric_key_prefix}_{name.removeprefix('eval_')}": value
            for name, value in metrics.items()
        }

    def save_model(
        self, output_dir: str | Path | None = None, _internal_call: bool = False
    ) -> Path:
        """Write the adapter, or the model, into ``output_dir``, as TRL does, or without one into
        ``adapter/`` or ``model/`` of the run's directory; returns where.

        In a run of several processes, process 0 writes and the others do nothing.
        """
        if output_dir is not None:
            into = Path(output_dir).expanduser()
            if self.processes.is_main:
                self._check_savable()
                checkpointing.write_weights(self.policy, self.processing_class, into)
            return into
        directory = Path(self.args.output_dir)
        if not self.processes.is_main:
            return directory
        return self._save_into(directory)

    def _save_into(self, directory: Path) -> Path:
        self._check_savable()
        return checkpointing.save_weights(self.policy, self.processing_class, directory)

    def _check_savable(self) -> None:
        """Raise CheckpointError or NonFiniteError where the weights are nobody's wish."""
        self.checkpointer.check_whole()
        if problem := not_finite(self.policy.trainable()):
            raise NonFiniteError(f"The weights are not saved: {problem}.")
