"""The parts of a trainer, made from its options and checked against each other.

Nothing here trains. Everything that can be wrong with options, data, rewards and model is found
here, the cheap checks before the expensive ones.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fusedgrpo import host
from fusedgrpo.config import learning
from fusedgrpo.config.rules import doubtful
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.config.structured import StructuredOutputs
from fusedgrpo.engine import torch_settings
from fusedgrpo.engine.advantages import Estimator, find_estimator
from fusedgrpo.engine.asking import Asking
from fusedgrpo.engine.batch_plan import BatchPlan, resolve_batch
from fusedgrpo.engine.custom_loss import CustomLoss, find_custom_loss
from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.engine.data.held_out import HeldOut, each_of
from fusedgrpo.engine.data.run_data import all_examples, load_data
from fusedgrpo.engine.data.selection import SelectedStream, find_selection
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.data.streams import is_stream
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.entropy_bonus import EntropyBonus
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.given_optimizer import check_optimizers, check_parameters
from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.optimizer import build_optimizer, build_scheduler, check_options
from fusedgrpo.engine.own_options import own_options, too_late_to_change
from fusedgrpo.engine.planned_work import memory_plan_of, offloading, work_limits
from fusedgrpo.engine.reporting.run_dir import RunDir
from fusedgrpo.engine.reporting.trackers import tracker_classes
from fusedgrpo.engine.rewards import RewardFunctions, build_rewards
from fusedgrpo.engine.rollout.choice import choose_sampler
from fusedgrpo.engine.rollout.completion_text import CompletionText
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.structured import check_structured, settle_schema
from fusedgrpo.engine.rollout_function import RolloutFunction
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.engine.run_description import weights_in_words
from fusedgrpo.engine.run_sampler import RunSampler
from fusedgrpo.engine.scoring import loss_options
from fusedgrpo.engine.token_choice import TokenChoice
from fusedgrpo.engine.tools.use import ToolUse, build_tool_use
from fusedgrpo.errors import ConfigError, brief
from fusedgrpo.models import liger_layers
from fusedgrpo.models.finite import check_loaded
from fusedgrpo.models.kinds import accepted
from fusedgrpo.models.policy import Policy, ReferenceSync
from fusedgrpo.models.settings import model_limits, model_settings
from fusedgrpo.models.tokenizer import check_tokenizer, eos_ids, load_tokenizer, text_tokenizer
from fusedgrpo.named_code import code_folders
from fusedgrpo.tasks import REWARD, is_task

log = logging.getLogger("fusedgrpo")


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
    asking: Asking
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
    tools: Any = None,
    environment_factory: Any = None,
    rollout_func: Any = None,
    search_paths: Sequence[str | Path],
) -> Parts:
    """The parts of a ``GRPOTrainer``, whose arguments these are. Raises ConfigError, DataError,
    RewardError, ModelError or OutputDirError."""
    args = own_options(
        args, model, quantization_config, peft_config, stream=is_stream(train_dataset)
    )
    given = check_optimizers(optimizers)
    learning.settle(args, quietly=given[0] is not None)
    processes = Processes.start(args.use_cpu)
    processes.run_on_main(lambda: RunDir.probe(args.output_dir))
    for text in doubtful(args):
        log.warning(text)
    # A launcher passes on the signal that the terminal has sent to everybody already.
    signals = StopSignals(echo_seconds=10.0 if processes.size > 1 else 0.0)
    tracker_classes(args.report_to)
    check_options(args)
    liger_layers.check(args)
    torch_settings.apply(args)
    folders = code_folders(search_paths)
    custom_loss = find_custom_loss(args.loss_type, folders)
    estimator = find_estimator(args, folders)
    formats = Formats(args.dataset_format, search_paths)
    settle_schema(args, folders)
    too_late_to_change(args)
    chosen_sampler = choose_sampler(args.sampler, sampler, folders)
    processing_class = load_tokenizer(args) if processing_class is None else processing_class
    tokenizer = text_tokenizer(processing_class)
    structured = StructuredOutputs.of(args.structured_outputs)
    if structured is not None and chosen_sampler.is_ours:
        check_structured(structured, tokenizer, args.max_completion_length)
    clock = RunClock(processes.run_on_main(datetime.now))
    tool_use = build_tool_use(
        args,
        args.tools if tools is None else tools,
        args.environment_factory if environment_factory is None else environment_factory,
        folders,
        ChatTemplate(processing_class, clock, args.chat_template_kwargs),
        signals.check,
    )
    _check_rollout_func(rollout_func, tool_use, sampler)
    rewards = build_rewards(
        _reward_funcs(args, reward_funcs, train_dataset),
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
        environments=[] if tool_use is None else tool_use.rewards,
    )
    try:
        if tool_use is not None:
            rewards.environments_of = tool_use.environments
        named = model is None or isinstance(model, (str, os.PathLike))
        model = None if named else accepted(model)
        if args.use_liger_kernel:
            liger_layers.check_type(args, model_settings(args) if model is None else model.config)
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
            "tools": None if tool_use is None else tool_use.tools,
        }
        train, held_out = load_data(
            args, processing_class, train_dataset, eval_dataset, reading, processes.size
        )
        memory_plan = None
        plan_for: Callable[[GRPOConfig], MemoryPlan | None] = lambda args: None  # noqa: E731
        if model is None and peft_config is None:  # else the options do not describe the model
            plan_for = functools.partial(
                memory_plan_of,
                settings=model_settings(args) if policy is None else policy.causal_lm.config,
                examples=all_examples(train, held_out),
                world_size=processes.size,
                sampler=chosen_sampler,
                reward_models=rewards.bytes,
            )
            memory_plan = plan_for(args)
        policy = policy or Policy.load(args, model, peft_config)
        check_tokenizer(tokenizer, policy.causal_lm)
        _check_equal(processes, args, train, held_out, policy)
        execution = Execution(work_limits(args, memory_plan, policy), processes, signals)
        plan = resolve_batch(args, len(train), processes.size)
        if plan.sampling_rounds > 1:  # groups are scored one by one
            rewards.patience = plan.groups_per_rollout * plan.num_generations // processes.size
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
            asking=_asking(args, tool_use, rollout_func, tokenizer, policy, ends, processes),
            train_dataset=train,
            eval_dataset=held_out,
            policy=policy,
            eos_ids=ends,
            plan=plan,
            stream=_stream(args, train, folders),
            estimate_advantages=estimator,
            learner=learner,
            run_sampler=run_sampler,
            sampler=run_sampler.make(),
            sampling=SamplingParams.of(args),
        )
    except BaseException:
        rewards.close()
        if tool_use is not None:
            tool_use.close()
        raise


def _asking(
    args: GRPOConfig,
    tool_use: ToolUse | None,
    rollout_func: Any,
    tokenizer: Any,
    policy: Policy,
    ends: Sequence[int],
    processes: Processes,
) -> Asking:
    function = None
    if rollout_func is not None:
        pad = getattr(tokenizer, "pad_token_id", None)
        function = RolloutFunction(
            rollout_func,
            CompletionText(tokenizer, ends, skip_special_tokens=args.skip_special_tokens),
            [*ends, *([] if pad is None else [pad])],
            most=args.max_completion_length,
            vocabulary_size=policy.vocabulary_size,
        )
    most = args.max_completion_length
    return Asking(tool_use, tokenizer, ends, most=most, processes=processes, function=function)


def _check_rollout_func(function: Any, tools: ToolUse | None, sampler: Any) -> None:
    """Raise ConfigError unless it alone says where completions come from."""
    if function is None:
        return
    if not callable(function):
        raise ConfigError(f"rollout_func is {brief(function)}, expected a function.")
    if tools is not None or sampler is not None:
        other = "sampler" if tools is None else "tools or an environment_factory"
        raise ConfigError(
            f"rollout_func makes whole completions, and so do {other}: give one of them."
        )


def _reward_funcs(args: GRPOConfig, given: Any, train_dataset: Any) -> Any:
    """The rewards that were passed, else the option's, else the verifier of tasks."""
    if given is not None or args.reward_funcs is not None:
        return args.reward_funcs if given is None else given
    source = args.dataset if train_dataset is None else train_dataset
    return [REWARD] if is_task(source) else None


def _stream(args: GRPOConfig, train: PromptDataset, folders: Sequence[Path]) -> PromptStream:
    """Raises ConfigError, DataError."""
    seed = args.seed if args.data_seed is None else args.data_seed
    option = args.prompt_selection
    if option == "uniform":
        return PromptStream(train, seed=seed, shuffle=args.shuffle_dataset)
    stream = SelectedStream(
        train,
        seed=seed,
        weigh=find_selection(option, train, folders),
        keeps_up=option == "informative",
    )
    stream.peek(1)  # what is wrong with weights of the user's is said before the first step
    return stream


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
        offload=offloading(args, memory_plan, policy),
    )


def describe(
    args: GRPOConfig, policy: Policy, plan: BatchPlan, processes: Processes, asking: Asking
) -> str:
    """The run in one line."""
    trained = sum(p.numel() for _, p in policy.trainable())
    trains = "all weights"
    if policy.adapters is not None:
        trains = f"{policy.adapters.describe()} on {weights_in_words(policy.causal_lm)} weights"
    line = (
        f"{plan.describe()}; {trains}, {trained / 1e6:.3g}M trained, computing in "
        f"{policy.precision} on {policy.device.type}"
    )
    line += f"; {processes.size} processes" if processes.size > 1 else ""
    line += f"; {asking.describe()}" if asking.describe() else ""
    return line + learning.said(args)
