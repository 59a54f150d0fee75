"""Held-out prompts, sampled and scored with the policy as it is."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout.metrics import length_metrics, reward_metrics
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.types import Group, Rollout
from fusedgrpo.engine.scoring import score_rollout
from fusedgrpo.engine.seeding import derive


def sample_and_score(
    data: PromptDataset,
    sampler: Sampler,
    rewards: RewardFunctions,
    *,
    n: int,
    params: SamplingParams,
    batch_size: int,
    seed: int,
    state: SimpleNamespace,
    processes: Processes,
) -> tuple[Rollout, RewardBatch]:
    """``n`` completions for each prompt of ``data``, ``batch_size`` completions at a time in each
    process, and their rewards."""
    per_batch = max(1, batch_size * processes.size // n)
    groups: list[Group] = []
    scored: list[RewardBatch] = []
    for start in range(0, len(data), per_batch):
        examples = data.examples[start : start + per_batch]
        part = sampler.sample(
            [example.prompt_ids for example in examples],
            n,
            params,
            seed,
            rows=[example.row for example in examples],
            first=start,
        )
        scored.append(
            score_rollout(
                rewards,
                Rollout(tuple(part)),
                examples,
                conversational=data.conversational,
                column_names=data.column_names,
                state=state,
                seed=derive(seed, "score", start),
                processes=processes,
            )
        )
        groups += part
    return Rollout(tuple(groups)), RewardBatch.joined(scored)


def evaluate(
    data: PromptDataset, sampler: Sampler, rewards: RewardFunctions, **how: Any
) -> dict[str, Any]:
    """The metrics of ``sample_and_score``, whose arguments these are, over all completions
    together."""
    rollout, scored = sample_and_score(data, sampler, rewards, **how)
    together = dataclasses.replace(scored, seconds={}, metrics={})
    group_ids = torch.tensor(rollout.group_ids)
    return length_metrics(rollout) | reward_metrics(rewards.names, together, group_ids, "group")
