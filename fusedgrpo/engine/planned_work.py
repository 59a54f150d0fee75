"""How much of a run is done at once, by its memory plan where it has one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.dataset import Example
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.memory.plan import MemoryPlan
from fusedgrpo.engine.memory.planner import card_bytes, plan_memory
from fusedgrpo.engine.rollout.choice import ChosenSampler
from fusedgrpo.errors import PlanError
from fusedgrpo.models.activation_offload import OffloadActivations
from fusedgrpo.models.adapters.files import planned_options
from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")

TOKENS_PER_MICROBATCH = {"cuda": 8192, "cpu": 4096}


def work_limits(args: GRPOConfig, memory_plan: MemoryPlan | None, policy: Policy) -> OOMRetry:
    """Tokens of a micro-batch and completions decoded together, to begin with."""
    return OOMRetry(
        args.tokens_per_microbatch
        or (memory_plan and memory_plan.tokens_per_microbatch)
        or TOKENS_PER_MICROBATCH[policy.device.type],
        memory_plan.max_in_flight if memory_plan else args.max_in_flight,
    )


def offloading(
    args: GRPOConfig, memory_plan: MemoryPlan | None, policy: Policy
) -> OffloadActivations | None:
    """Where checkpointed activations go, if they leave the card."""
    planned = memory_plan is not None and memory_plan.activation_offloading
    return OffloadActivations(policy.device) if args.activation_offloading or planned else None


def follow_plan(args: GRPOConfig, memory_plan: MemoryPlan | None, learner: Learner) -> None:
    """Do as much at once as another plan of the run says."""
    limits = work_limits(args, memory_plan, learner.policy)
    oom_retry = learner.execution.oom_retry
    oom_retry.tokens, oom_retry.in_flight = limits.tokens, limits.in_flight
    learner.offload = offloading(args, memory_plan, learner.policy) or contextlib.nullcontext()


def memory_plan_of(
    args: GRPOConfig,
    *,
    settings: Any,
    examples: Sequence[Example],
    world_size: int,
    sampler: ChosenSampler,
    reward_models: int = 0,
) -> MemoryPlan | None:
    """The memory that the run will need of its card; None where there is none and none was named,
    and for models that cannot be planned. reward_models: bytes of their weights."""
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
            reward_models=reward_models,
        )
    except PlanError as error:
        log.warning("%s The run goes on without a plan.", error)
        return None
