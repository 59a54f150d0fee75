"""``GRPOTrainer``: prompts and reward functions in; a trained adapter, metrics and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import checkpointing
from fusedgrpo.engine.callback_events import CallbackEvents
from fusedgrpo.engine.callbacks import sorted_callbacks
from fusedgrpo.engine.checkpointer import Checkpointer
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.collector import Collector
from fusedgrpo.engine.data.run_data import all_examples
from fusedgrpo.engine.drift_check import DriftCheck
from fusedgrpo.engine.held_out_check import HeldOutCheck
from fusedgrpo.engine.memory.plan import measured_phases, plan_table
from fusedgrpo.engine.publishing import Publishing
from fusedgrpo.engine.reporting.no_logger import NoLogger
from fusedgrpo.engine.reporting.opening import opening
from fusedgrpo.engine.reporting.phase_timer import PhaseTimer
from fusedgrpo.engine.reporting.run_logger import RunLogger
from fusedgrpo.engine.reporting.unwritten import Unwritten
from fusedgrpo.engine.resuming import Resuming
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.engine.run_session import recorded_session
from fusedgrpo.engine.setup import build_parts, describe
from fusedgrpo.engine.step_bounds import StepBounds, card_name
from fusedgrpo.engine.step_records import StepRecords
from fusedgrpo.engine.train_summary import TrainSummary
from fusedgrpo.engine.trl_surface import METHODS
from fusedgrpo.engine.warmup import warm_up
from fusedgrpo.errors import ConfigError
from fusedgrpo.models import missing_backward


class GRPOTrainer(Publishing, Resuming, StepRecords):
    """Trains a causal language model with GRPO. Arguments and behaviour follow ``trl.GRPOTrainer``.

    model: a name or path, of a model or of an adapter; a transformers model; or a peft model; None
        for ``args.model_name_or_path``. An adapter that is there is trained further, else LoRA is
        added (``finetuning_type: full`` trains all weights). Frozen weights of one that is given
        keep their dtype. reward_funcs: names, callables, reward models, or a list of these; None
        for ``args.reward_funcs``. args: a ``GRPOConfig``, or TRL's, which is translated.
    train_dataset, eval_dataset: a ``datasets.Dataset``, a list of dicts, or a name or path; None
        for those of ``args``, or where an environment says all prompts. What was read of them is
        ``data`` and ``held_out``; another data set that is put into ``eval_dataset`` is evaluated
        from then on. processing_class, or tokenizer: the tokenizer, or a Processor that has one, if
        not the model's.
    quantization_config, peft_config: of bitsandbytes and peft, instead of what ``args`` describes.
    callbacks: of ``fusedgrpo.Callback`` and ``transformers.TrainerCallback``, told what happens in
    ``train``. optimizers: ``(optimizer, scheduler)`` over the parameters that are trained, instead
    of what ``args`` describes; the scheduler may be None. tools: functions that the policy may
    call, or their names, ``file.py:name``; environment_factory: a class, or classes by name, an
    instance of which each completion acts in, its public methods being tools. Both run in processes
    of their own. rollout_func: ``function(prompts, trainer)`` that makes completions, as in TRL;
    see ``RolloutFunction``.
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
        self.callbacks, theirs = sorted_callbacks(callbacks)
        with opening(bars=not getattr(args, "disable_tqdm", None)):
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
                optimizers=optimizers,
                sampler=sampler,
                tools=tools,
                environment_factory=environment_factory,
                rollout_func=rollout_func,
                search_paths=search_paths,
            )
        self.args = parts.args
        self.execution = parts.execution
        self.processes = parts.execution.processes
        self.signals = parts.execution.signals
        self.processing_class = parts.processing_class
        self.scheduler_is_given = bool(optimizers and optimizers[1] is not None)
        self.tokenizer = parts.tokenizer
        self.clock = parts.clock
        self.formats = parts.formats
        self.reward_funcs = parts.reward_funcs
        self.asking = parts.asking
        if self.asking.function is not None:
            self.asking.function.trainer = self
        self.data = parts.train_dataset
        self.held_out = parts.eval_dataset
        self.given_datasets = train_dataset, eval_dataset
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
        self.bounds = StepBounds(self, card_name(self.policy.device))
        self.collector = Collector(self)
        self.run_control = RunControl(parts.args, parts.plan)
        self.held_out_check = HeldOutCheck(self)
        self.drift_check = DriftCheck(self)
        self.checkpointer = Checkpointer(self)
        self.events = CallbackEvents(self, theirs)
        self.learner.changing = self._before_update
        self.learner.changed = lambda: self.events.fire("on_optimizer_step")

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> TrainOutput:
        """Run to the end, or from a checkpoint on. Returns transformers' ``TrainOutput``: the mean
        loss of the steps that were done, and as ``metrics`` those of the last step with
        ``train_runtime``, ``train_loss`` and the like. ignore_keys_for_eval: TRL's; there is
        nothing to ignore.

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
            if args.push_to_hub:
                self.processes.run_on_main(self.init_hf_repo)
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
                    plan_line=describe(args, self.policy, self.plan, self.processes, self.asking),
                    eos_ids=self.eos_ids,
                    unwritten=self.unwritten,
                    branch=found is not None,
                    sampled_ahead=self.buffer is not None and self.buffer.done == 0,
                    callbacks=self.callbacks,
                    shows=self.run_control.shows,
                )
            )
            all_steps_done = stack.enter_context(recorded_session(self, outputs))
            stack.enter_context(self.execution.watched(outputs.progress))
            step, total = self.progress.step, self.plan.total_steps
            if said := checkpointing.begins(found, resume, checkpoints, step, total):
                outputs.display.note(said)
            outputs.skipped_rows(self.data.skipped)
            if self.memory_plan is not None:
                outputs.display.note(f"Memory, planned:\n{plan_table(self.memory_plan)}")
            if args.rehearsal or (args.rehearsal is None and self.policy.device.type == "cuda"):
                outputs.display.phase("warm up")
                outputs.display.note(self.warm_up())
            row: dict[str, Any] = {}
            summary = TrainSummary(self.progress.step, self.plan.completions_per_step)
            with self.checkpointer.saved_if_it_ends(outputs), missing_backward.refused():
                self.events.begin_training()
                outputs.write(self.unwritten, self.progress.step)
                if self.unwritten.evaluation_due:
                    row = self._finish_row(outputs)
                elif found is not None and found.resolve().parent != checkpoints.resolve():
                    # The run's own checkpoints are of another run, if there are any.
                    self.checkpointer.save_if_due(outputs, args.save_strategy != "no")
                if self.run_control.evaluates_first(self.progress.step):
                    outputs.evaluated_first(self._evaluate(outputs))
                checks = self.held_out_check.steps()
                self._check_held_out(outputs, self.progress.step in checks)
                while not (self.finished or self.control.should_training_stop):
                    row = self.step(outputs)
                    summary.add(row["loss"])
                    self._check_held_out(outputs, self.progress.step in checks)
                self._check_held_out(outputs, bool(checks))
                self.checkpointer.settle(outputs)
            self.checkpointer.load_best(outputs)
            measured = measured_phases(self.memory_peaks)
            if self.memory_plan is not None and measured:
                table = plan_table(self.memory_plan, measured)
                outputs.display.note(f"Memory, planned and measured:\n{table}")
            all_steps_done()
            outputs.finish(self._save_into)
            if pushed := self._push_result():
                outputs.display.note(pushed)
            metrics = summary.metrics(self.progress.step)
            self.log({**self.events.means.take_rest(), **metrics})
            self.events.fire("on_train_end")
        return TrainOutput(self.progress.step, summary.loss, {**row, **metrics})

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
                    len(example.prompt_ids) for example in all_examples(self.data, self.held_out)
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
        if outputs is None:
            with self.events.muted():
                return self.step(NoLogger())
        self._check_more_to_do()
        self.checkpointer.check_whole()
        self.events.begin_step()
        timer = PhaseTimer(outputs.display.phase, on_gpu=self.policy.device.type == "cuda")
        if self.buffer is None or self.buffer.finished:
            collected = self.collector.collect(timer.phase)
            with timer.phase("score"):
                buffer = self.collector.buffer(collected)
            self.bounds.collected(collected.rollout, buffer)
            self._take(buffer, collected, outputs)
        assert self.buffer is not None
        chosen = self._begin_drift_check(outputs)
        samples = self.buffer.next_samples(mask_truncated=self.args.mask_truncated_completions)
        with self.checkpointer.one_change(f"the update of step {self.progress.step + 1}"):
            with timer.phase("update"):
                result = self.learner.step(samples, self.progress.step)
            self._accept(result, samples, outputs, timer)
        if result.applied:
            self.processes.run_everywhere(self.sampler.weights_changed)
        self._measure(self.unwritten.rows[-1])
        self._tell_of_step()
        row = self._finish_row(outputs)
        if result.applied:
            self._end_drift_check(outputs, chosen)
        self._save_if_due(outputs)
        self.processes.run_everywhere(self.execution.check_interrupt)
        return row

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train on: all steps are done, or, where a callback has
        cut epochs short, all prompts are behind."""
        served = self.buffer is None or self.buffer.finished
        prompts = self.plan.total_prompts
        return self.progress.step >= self.plan.total_steps or (
            prompts is not None and served and self.stream.cursor >= prompts
        )

    def _check_more_to_do(self) -> None:
        if self.progress.step and self.finished:
            raise ConfigError("This trainer has finished its run. Make a new one to train again.")
