"""The parts of a trainer, made from its options and checked against each other.

Nothing here trains. Everything that can be wrong with options, data, rewards and model is found
here, the cheap checks before the expensive ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fusedgrpo import host
from fusedgrpo.config.from_trl import given_options, is_foreign
from fusedgrpo.config.rules import doubtful
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine import metric_schedule, torch_settings
from fusedgrpo.engine.advantages import Estimator, find_estimator
from fusedgrpo.engine.batch_plan import BatchPlan, resolve_batch
from fusedgrpo.engine.custom_loss import CustomLoss, find_custom_loss
from fusedgrpo.engine.data.dataset import Example, PromptDataset, load_prompts
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.engine.data.held_out import HeldOut, each_of, load_held_out
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.data.streams import training_rows
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.entropy_bonus import EntropyBonus
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.given_optimizer import check_optimizers, check_parameters
from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.memory.planner import card_bytes, plan_memory
from fusedgrpo.engine.optimizer import build_optimizer, build_scheduler, check_options
from fusedgrpo.engine.reporting.run_dir import RunDir
from fusedgrpo.engine.reporting.trackers import tracker_classes
from fusedgrpo.engine.rewards import RewardFunctions, build_rewards
from fusedgrpo.engine.rollout.choice import ChosenSampler, choose_sampler
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.engine.run_sampler import RunSampler
from fusedgrpo.engine.scoring import loss_options
from fusedgrpo.engine.token_choice import TokenChoice
from fusedgrpo.errors import ConfigError, PlanError
from fusedgrpo.models.activation_offload import OffloadActivations
from fusedgrpo.models.adapters.attached import has_adapters
from fusedgrpo.models.adapters.files import planned_options
from fusedgrpo.models.finite import check_loaded
from fusedgrpo.models.kinds import accepted
from fusedgrpo.models.policy import Policy, ReferenceSync
from fusedgrpo.models.settings import model_limits, model_settings
from fusedgrpo.models.tokenizer import check_tokenizer, eos_ids, load_tokenizer, text_tokenizer
from fusedgrpo.named_code import code_folders

log = logging.getLogger("fusedgrpo")

TOKENS_PER_MICROBATCH = {"cuda": 8192, "cpu": 4096}


@dataclass(kw_only=True)
class Parts:
    """Everything that a trainer is made of, in the order in which it is made."""

    args: GRPOConfig
    execution: Execution
    processing_class: Any
    tokenizer: Any
    clock: RunClock
    formats: Formats
    reward_funcs: RewardFunctions
    train_dataset: PromptDataset
    eval_dataset: HeldOut | None
    policy: Policy
    eos_ids: list[int]
    plan: BatchPlan
    stream: PromptStream
    estimate_advantages: Estimator
    learner: Learner
    run_sampler: RunSampler
    sampler: Sampler
    sampling: SamplingParams


def build_parts(
    args: GRPOConfig | None,
    model: Any,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    *,
    reward_processing_classes: Any,
    quantization_config: Any,
    peft_config: Any,
    optimizers: Any = None,
    sampler: Any,
    search_paths: Sequence[str | Path],
) -> Parts:
    """The parts of a ``GRPOTrainer``, whose arguments these are. Raises ConfigError, DataError,
    RewardError, ModelError or OutputDirError."""
    args = own_options(args, model, quantization_config, peft_config)
    given = check_optimizers(optimizers)
    processes = Processes.start(args.use_cpu)
    processes.run_on_main(lambda: RunDir.probe(args.output_dir))
    for text in doubtful(args):
        log.warning(text)
    # A launcher passes on the signal that the terminal has sent to everybody already.
    signals = StopSignals(echo_seconds=10.0 if processes.size > 1 else 0.0)
    tracker_classes(args.report_to)
    check_options(args)
    torch_settings.apply(args)
    folders = code_folders(search_paths)
    custom_loss = find_custom_loss(args.loss_type, folders)
    estimator = find_estimator(args, folders)
    formats = Formats(args.dataset_format, search_paths)
    chosen_sampler = choose_sampler(args.sampler, sampler, folders)
    processing_class = load_tokenizer(args) if processing_class is None else processing_class
    tokenizer = text_tokenizer(processing_class)
    clock = RunClock(processes.run_on_main(datetime.now))
    rewards = build_rewards(
        args.reward_funcs if reward_funcs is None else reward_funcs,
        weights=args.reward_weights,
        kwargs=args.reward_kwargs,
        on_error=args.on_reward_error,
        timeout=args.reward_timeout,
        device=host.pick_device(args.use_cpu),
        reward_processing_classes=reward_processing_classes,
        model_kwargs={"trust_remote_code": args.trust_remote_code},
        search_paths=search_paths,
        signals=signals,
        clock=clock,
    )
    try:
        named = model is None or isinstance(model, (str, os.PathLike))
        model = None if named else accepted(model)
        # Data errors come before gigabytes are loaded, where the model's limits are known by then.
        policy = None
        limits = model_limits(args, model)
        if limits is None:
            policy = Policy.load(args, model, peft_config)
            limits = model_limits(args, policy.causal_lm)
        reading: dict[str, Any] = {
            **(limits or {}),
            "clock": clock,
            "formats": formats,
            "said": set(),
        }
        train_dataset = training_rows(train_dataset, args, processes.size)
        train, held_out = _load_data(args, processing_class, train_dataset, eval_dataset, reading)
        memory_plan = None
        plan_for: Callable[[GRPOConfig], MemoryPlan | None] = lambda args: None  # noqa: E731
        if model is None and peft_config is None:  # else the options do not describe the model
            plan_for = functools.partial(
                _plan_memory,
                settings=model_settings(args) if policy is None else policy.causal_lm.config,
                examples=all_examples(train, held_out),
                world_size=processes.size,
                sampler=chosen_sampler,
            )
            memory_plan = plan_for(args)
        policy = policy or Policy.load(args, model, peft_config)
        check_tokenizer(tokenizer, policy.causal_lm)
        _check_equal(processes, args, train, held_out, policy)
        execution = Execution(_limits(args, memory_plan, policy), processes, signals)
        plan = resolve_batch(args, len(train), processes.size)
        ends = eos_ids(policy.causal_lm, tokenizer)
        learner = _learner(args, policy, plan, execution, memory_plan, custom_loss, given)
        run_sampler = RunSampler(
            args, policy, tokenizer, ends, execution, chosen_sampler, memory_plan, plan_for
        )
        return Parts(
            args=args,
            execution=execution,
            processing_class=processing_class,
            tokenizer=tokenizer,
            clock=clock,
            formats=formats,
            reward_funcs=rewards,
            train_dataset=train,
            eval_dataset=held_out,
            policy=policy,
            eos_ids=ends,
            plan=plan,
            stream=PromptStream(
                train,
                seed=args.seed if args.data_seed is None else args.data_seed,
                shuffle=args.shuffle_dataset,
            ),
            estimate_advantages=estimator,
            learner=learner,
            run_sampler=run_sampler,
            sampler=run_sampler.make(),
            sampling=SamplingParams.of(args),
        )
    except BaseException:
        rewards.close()
        raise


def _check_equal(
    processes: Processes,
    args: GRPOConfig,
    train: PromptDataset,
    held_out: HeldOut | None,
    policy: Policy,
) -> None:
    """Whether all processes have the same run."""
    processes.check_equal(
        {
            "the training data": train.fingerprint,
            "the evaluation data": [part.fingerprint for part in each_of(held_out)],
            "the precision": policy.precision,
        }
        | {name: value for name, value in args.to_record().items() if name != "output_dir"}
    )
    check_loaded(policy.model)
    processes.check_equal_weights(policy.model)


def _learner(
    args: GRPOConfig,
    policy: Policy,
    plan: BatchPlan,
    execution: Execution,
    memory_plan: MemoryPlan | None,
    custom_loss: CustomLoss | None,
    given: tuple[torch.optim.Optimizer | None, Any],
) -> Learner:
    optimizer, scheduler = given
    if optimizer is None:
        optimizer = build_optimizer(args, policy.trainable())
    else:
        check_parameters(optimizer, policy.trainable())
    return Learner(
        policy,
        optimizer,
        scheduler or build_scheduler(args, optimizer, plan.total_steps),
        loss_options(args),
        max_grad_norm=args.max_grad_norm,
        execution=execution,
        custom_loss=custom_loss,
        bonus=EntropyBonus(
            args.entropy_coef,
            args.use_adaptive_entropy,
            args.entropy_coef_min,
            args.entropy_coef_max,
            args.entropy_coef_delta,
            args.entropy_target,
        ),
        choice=TokenChoice(
            top_entropy=args.top_entropy_quantile,
            off_policy=args.off_policy_mask_threshold,
            by_sampler=args.sampler_correction,
        ),
        reference=ReferenceSync(
            args.ref_model_sync_steps if args.sync_ref_model else 0, args.ref_model_mixup_alpha
        ),
        seed=args.seed,
        offload=_offload(args, memory_plan, policy),
    )


def _limits(args: GRPOConfig, memory_plan: MemoryPlan | None, policy: Policy) -> OOMRetry:
    return OOMRetry(
        args.tokens_per_microbatch
        or (memory_plan and memory_plan.tokens_per_microbatch)
        or TOKENS_PER_MICROBATCH[policy.device.type],
        memory_plan.max_in_flight if memory_plan else args.max_in_flight,
    )


def _offload(
    args: GRPOConfig, memory_plan: MemoryPlan | None, policy: Policy
) -> OffloadActivations | None:
    planned = memory_plan is not None and memory_plan.activation_offloading
    return OffloadActivations(policy.device) if args.activation_offloading or planned else None


def follow_plan(args: GRPOConfig, memory_plan: MemoryPlan | None, learner: Learner) -> None:
    """Do as much at once as another plan of the run says."""
    limits = _limits(args, memory_plan, learner.policy)
    oom_retry = learner.execution.oom_retry
    oom_retry.tokens, oom_retry.in_flight = limits.tokens, limits.in_flight
    learner.offload = _offload(args, memory_plan, learner.policy) or contextlib.nullcontext()


def _plan_memory(
    args: GRPOConfig,
    *,
    settings: Any,
    examples: Sequence[Example],
    world_size: int,
    sampler: ChosenSampler,
) -> MemoryPlan | None:
    """The memory that the run will need of its card; None where there is none and none was named,
    and for models that cannot be planned."""
    card = card_bytes(args)
    if card is None:
        return None
    try:
        return plan_memory(
            planned_options(args),
            settings,
            gpu_bytes=card,
            prompt_tokens=max(len(example.prompt_ids) for example in examples),
            activation_offloading=args.activation_offloading,
            world_size=world_size,
            sampler_memory=sampler.memory,
            decoder=sampler.decodes,
        )
    except PlanError as error:
        log.warning("%s The run goes on without a plan.", error)
        return None


def all_examples(train: PromptDataset, held_out: HeldOut | None) -> list[Example]:
    """All that may be sampled."""
    return [example for part in (train, *each_of(held_out)) for example in part.examples]


def _load_data(
    args: GRPOConfig, processing_class: Any, train: Any, held_out: Any, reading: dict[str, Any]
) -> tuple[PromptDataset, HeldOut | None]:
    source = args.dataset if train is None else train
    if source is None:
        raise ConfigError(
            "`train_dataset` is required: dataset is missing. Pass train_dataset, or give dataset "
            "a file, a directory or a name in dataset_dir."
        )
    prompts = load_prompts(source, args, processing_class, **reading)
    held_out = args.eval_dataset if held_out is None else held_out
    evaluation: HeldOut | None = None
    if held_out is not None:
        evaluation = load_held_out(
            held_out,
            args.max_samples,
            lambda one: load_prompts(one, args, processing_class, split="test", **reading),
        )
    elif args.val_size:
        prompts, evaluation = prompts.split(args.val_size, args.seed)
    if args.eval_strategy != "no" and evaluation is None:
        raise ConfigError(
            f"eval_strategy: {args.eval_strategy} needs an eval_dataset or a val_size."
        )
    return prompts, evaluation


def describe(policy: Policy, plan: BatchPlan, processes: Processes) -> str:
    """The run in one line."""
    trained = sum(p.numel() for _, p in policy.trainable())
    trains = "all weights"
    if policy.adapters is not None:
        trains = f"{policy.adapters.describe()} on {_bits(policy.causal_lm)} weights"
    line = (
        f"{plan.describe()}; {trains}, {trained / 1e6:.3g}M trained, computing in "
        f"{policy.precision} on {policy.device.type}"
    )
    return line + (f"; {processes.size} processes" if processes.size > 1 else "")


def own_options(
    args: Any, model: Any, quantization_config: Any, peft_config: Any = None
) -> GRPOConfig:
    """A copy of the configuration with the name of the model that was passed, for the record, and
    with what ``quantization_config`` describes. TRL's and transformers' arguments are translated,
    option by option."""
    by_name = isinstance(model, (str, os.PathLike))
    if is_foreign(args):
        args = _translated(args, model, by_name, peft_config)
    if args is not None and not isinstance(args, GRPOConfig):
        raise ConfigError(
            f"args: expected a fusedgrpo.GRPOConfig or a trl.GRPOConfig, got "
            f"{type(args).__module__}.{type(args).__qualname__}."
        )
    config = getattr(model, "config", None)
    name = os.fspath(model) if by_name else getattr(config, "_name_or_path", None)
    if args is None:  # as in TRL, the run is named after its model
        args = GRPOConfig(output_dir=f"{Path(name).name}-GRPO") if name else GRPOConfig()
    object.__setattr__(args, "_used", True)
    own = dataclasses.replace(args, **{"model_name_or_path": name} if name else {})
    if quantization_config is not None:
        if not by_name and model is not None:
            raise ConfigError(
                "quantization_config: the model is loaded already; give its name, or load it in "
                "4 bits yourself."
            )
        given = {**(own.model_init_kwargs or {}), "quantization_config": quantization_config}
        own.model_init_kwargs = given
    if (compared := metric_schedule.metric_name(own)) is not None:
        # transformers' EarlyStoppingCallback reads both.
        own.metric_for_best_model = own.metric_for_best_model or compared
        own.greater_is_better = metric_schedule.greater_is_better(own)
    object.__setattr__(own, "_used", True)
    return own


def _translated(args: Any, model: Any, by_name: bool, peft_config: Any) -> GRPOConfig:
    """Another trainer's arguments as options. There, what trains without a ``peft_config`` is the
    model itself, unless it has an adapter."""
    given = given_options(args)
    if by_name:
        adapter = (Path(model).expanduser() / "adapter_config.json").exists()
    else:
        adapter = model is not None and has_adapters(model)
    if peft_config is None and not adapter:
        given["finetuning_type"] = "full"
        log.info("args are TRL's and there is no peft_config: all weights are trained, as in TRL.")
    return GRPOConfig.from_dict(given)


def _bits(model: Any) -> str:
    if getattr(model, "is_loaded_in_4bit", False):
        return "4-bit"
    sizes: Counter[Any] = Counter()
    for parameter in model.parameters():
        sizes[parameter.dtype] += parameter.numel() * parameter.is_floating_point()
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.")
