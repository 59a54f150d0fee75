"""From batch sizes to whole groups: how many prompts per step, per rollout and per run.

Nothing has to divide anything. Where TRL asks for completions, whole groups are taken instead,
rounded up, and :meth:`BatchPlan.describe` says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How much a run samples, and when it updates. Groups are prompts with their completions.

    groups_per_rollout are sampled in one go and serve ``steps_per_rollout`` optimizer steps of
    ``groups_per_step`` each (the last one may have fewer), ``num_iterations`` times over.
    total_prompts is None for a run limited by ``max_steps``; a run by epochs samples exactly
    total_prompts, its last rollout takes what is left, and total_steps counts exactly that. With
    dynamic sampling a rollout takes up to ``sampling_rounds`` times its groups, and a run by epochs
    has as many steps as without it, over more prompts: total_prompts is None.
    """

    num_prompts: int
    num_generations: int
    asked_completions: int | None  # per step, None if the number of prompts was given
    groups_per_step: int
    groups_per_rollout: int
    steps_per_rollout: int
    num_iterations: int
    total_prompts: int | None
    total_steps: int
    sampling_rounds: int = 1

    @property
    def completions_per_step(self) -> int:
        return self.groups_per_step * self.num_generations

    @property
    def prompts(self) -> int:
        """How many are sampled: in a run by steps in whole rollouts, in one by epochs what is left
        for the last."""
        rollouts = math.ceil(self.total_steps / (self.steps_per_rollout * self.num_iterations))
        return self.total_prompts or rollouts * self.groups_per_rollout

    @property
    def epochs(self) -> int:
        """Passes over the data, the last of which may be a part of one."""
        return math.ceil(self.prompts / self.num_prompts)

    def describe(self) -> str:
        """The plan in one line, with every rounding that was made."""
        step = f"{_count(self.groups_per_step, 'prompt')} x {self.num_generations} completions"
        parts = [f"{step} per step"]
        if self.asked_completions not in (None, self.completions_per_step):
            asked = _count(self.asked_completions or 0, "completion")
            parts[0] += f" (asked for {asked}, rounded up to whole groups)"
        steps = self.steps_per_rollout * self.num_iterations
        if steps > 1:
            text = f"{_count(self.groups_per_rollout, 'prompt')} sampled at once for {steps} steps"
            if self.num_iterations > 1:
                text += f" ({_count(self.num_iterations, 'pass', 'es')} over them)"
            parts.append(text)
        if self.sampling_rounds > 1:
            most = self.sampling_rounds * self.groups_per_rollout
            parts.append(f"up to {_count(most, 'prompt')} tried for groups whose rewards differ")
        epochs = f"{self.prompts / self.num_prompts:.3g}"
        if self.sampling_rounds > 1:
            epochs = f"at least {epochs}"
        run = f"{_count(self.total_steps, 'step')} = {epochs} epoch{'' if epochs == '1' else 's'}"
        parts.append(f"{run} of {_count(self.num_prompts, 'prompt')}")
        return "; ".join(parts)


def resolve_batch(config: GRPOConfig, num_prompts: int, world_size: int = 1) -> BatchPlan:
    """The plan of a run over ``num_prompts`` training prompts on ``world_size`` processes.

    Raises ConfigError without prompts.
    """
    if num_prompts < 1:
        raise ConfigError("There are no training prompts.")
    group = config.num_generations
    micro_batch = config.per_device_train_batch_size * world_size
    asked: int | None = None
    if config.prompts_per_step is not None:
        per_step = config.prompts_per_step
    else:
        asked = micro_batch * config.gradient_accumulation_steps
        per_step = math.ceil(asked / group)

    completions = config.generation_batch_size
    if config.steps_per_generation is not None:
        completions = micro_batch * config.steps_per_generation
    # Sampling twice for one step is sampling once: the policy does not change in between.
    per_rollout = per_step if completions is None else max(per_step, math.ceil(completions / group))

    total_prompts: int | None = None
    if config.max_steps > 0:
        total_steps = config.max_steps
    else:
        # Exact decimals: 0.1 epochs of 30 prompts are 3, and not 4 for 3.0000000000000004.
        total_prompts = math.ceil(Fraction(str(config.num_train_epochs)) * num_prompts)
        rollouts, rest = divmod(total_prompts, per_rollout)
        passes = rollouts * math.ceil(per_rollout / per_step) + math.ceil(rest / per_step)
        total_steps = passes * config.num_iterations
        if config.dynamic_sampling:
            total_prompts = None
    return BatchPlan(
        num_prompts=num_prompts,
        num_generations=group,
        asked_completions=asked,
        groups_per_step=per_step,
        groups_per_rollout=per_rollout,
        steps_per_rollout=math.ceil(per_rollout / per_step),
        num_iterations=config.num_iterations,
        total_prompts=total_prompts,
        total_steps=total_steps,
        sampling_rounds=config.max_sampling_rounds if config.dynamic_sampling else 1,
    )


def decoded_together(rows: int, n: int) -> int:
    """How many completions are a decode batch where ``rows`` may be in flight: whole groups of
    ``n`` if one fits, so that no prompt is prefilled twice."""
    return rows - rows % n or rows


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
