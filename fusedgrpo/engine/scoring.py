"""What a rollout is given before it is trained on: rewards, advantages, old and reference
log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.config import GRPOConfig
from fusedgrpo.engine.data import Example
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout import Rollout
from fusedgrpo.engine.rollout_metrics import (
    length_metrics,
    mismatch_metrics,
    reward_metrics,
    weight_metrics,
)
from fusedgrpo.engine.samples import micro_batches
from fusedgrpo.engine.window import RolloutWindow, sampler_logp
from fusedgrpo.kernels import group_advantages
from fusedgrpo.models.packed import PackedBatch
from fusedgrpo.models.policy import Policy


def per_completion(rollout: Rollout, examples: Sequence[Example]) -> list[Example]:
    """``[B]``: the example that each completion answers."""
    return [examples[group] for group in rollout.group_ids]


def score_rollout(
    rewards: RewardFunctions,
    rollout: Rollout,
    examples: Sequence[Example],
    *,
    conversational: bool,
    column_names: Sequence[str],
    state: SimpleNamespace,
) -> RewardBatch:
    """Call the reward functions, by TRL's convention: strings for plain prompts, lists with one
    assistant message for conversational ones, and every other column of the data by its name."""
    asked = per_completion(rollout, examples)
    texts: list[Any] = [completion.text for completion in rollout.completions()]
    if conversational:
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    return rewards.score(
        prompts=[example.prompt for example in asked],
        completions=texts,
        completion_ids=[list(completion.ids) for completion in rollout.completions()],
        columns={name: [example.columns[name] for example in asked] for name in column_names},
        trainer_state=state,
        rows=[example.row for example in asked],
    )


def rollout_logprobs(
    policy: Policy, rollout: Rollout, max_tokens: int, poll: Callable[[], None] = lambda: None
) -> Tensor:
    """Log-probs ``[N]`` float32 on the CPU of all completion tokens, without gradients.

    The same route and the same cut into micro-batches as the update; call it inside
    ``policy.reference()`` for the reference's.
    """
    pairs = [(group.prompt_ids, c.ids) for group in rollout.groups for c in group.completions]
    lengths = [len(prompt) + len(completion) for prompt, completion in pairs]
    parts: list[Tensor] = [torch.zeros(0)] * len(pairs)
    with policy.scoring():
        for members in micro_batches(lengths, max_tokens):
            poll()
            packed = PackedBatch.build([pairs[i] for i in members], policy.device)
            logp = policy.logprobs(packed).logp.cpu()
            sizes = [len(pairs[i][1]) for i in members]
            for i, part in zip(members, logp.split(sizes), strict=True):
                parts[i] = part
    return torch.cat(parts)


def make_window(
    rollout: Rollout,
    rewards: RewardBatch,
    functions: RewardFunctions,
    policy: Policy,
    config: GRPOConfig,
    *,
    steps: int,
    max_tokens: int,
    poll: Callable[[], None] = lambda: None,
) -> RolloutWindow:
    """Advantages, and the log-probs that the loss will compare with, of a scored rollout."""
    group_ids = torch.tensor(rollout.group_ids)
    advantages = group_advantages(
        rewards.values,
        group_ids=group_ids,
        weights=functions.weights,
        scale_rewards=config.scale_rewards,
        multi_objective_aggregation=config.multi_objective_aggregation,
    )
    metrics = length_metrics(rollout) | reward_metrics(
        functions.names, rewards, group_ids, config.scale_rewards
    )
    window = RolloutWindow(rollout, advantages, steps, config.num_iterations, metrics=metrics)
    # One update on its own rollout needs no old log-probs: they are the policy's own.
    if steps * config.num_iterations > 1 or config.sampler_correction:
        window.old_logp = rollout_logprobs(policy, rollout, max_tokens, poll)
        sampled = sampler_logp(list(rollout.completions()))
        metrics |= mismatch_metrics(sampled, window.old_logp)
        if config.sampler_correction:
            weight = (window.old_logp - sampled).exp().clamp(max=config.sampler_correction_cap)
            window.sampler_weight = weight
            metrics |= weight_metrics(weight)
    if config.beta:
        with policy.reference():
            window.ref_logp = rollout_logprobs(policy, rollout, max_tokens, poll)
    return window
