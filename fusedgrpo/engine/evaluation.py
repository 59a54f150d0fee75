"""Held-out prompts, sampled and scored with the policy as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from fusedgrpo import stages
from fusedgrpo.engine.advantages import Estimator
from fusedgrpo.engine.asking import Asking
from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.reporting.completions_log import completion_records
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.metrics import completion_metrics, reward_metrics
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.training_sample import concatenated, loss_mask
from fusedgrpo.engine.rollout.types import Group, Rollout
from fusedgrpo.engine.scoring import per_completion, rollout_logprobs, score_rollout
from fusedgrpo.engine.seeding import derive


class Answered(NamedTuple):
    """The completions of some prompts and their rewards; examples: as they were asked."""

    rollout: Rollout
    scored: RewardBatch
    examples: list[Example]


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
    asking: Asking,
) -> Answered:
    """``n`` completions for each prompt of ``data``, ``batch_size`` completions at a time in each
    process, and their rewards."""
    per_batch = max(1, batch_size * asking.processes.size // n)
    groups: list[Group] = []
    scored: list[RewardBatch] = []
    asked: list[Example] = []
    for start in stages.count(range(0, len(data), per_batch), "batches"):
        examples = data.examples[start : start + per_batch]
        with asking.begun(examples, seed, data.encoder, start) as questions:
            part = asking.sample(sampler, questions, n, params)
            scored += score_rollout(
                rewards,
                Rollout(tuple(part)),
                questions,
                conversational=data.conversational,
                column_names=data.column_names,
                state=state,
                seed=derive(seed, "score", start),
                processes=asking.processes,
            )
        groups += part
        asked += questions.examples
    return Answered(Rollout(tuple(groups)), RewardBatch.joined(scored), asked)


def evaluate(
    data: PromptDataset,
    sampler: Sampler,
    rewards: RewardFunctions,
    *,
    loss: Callable[[Rollout, RewardBatch], float] | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """The metrics of ``sample_and_score``, whose arguments these are, over all completions
    together. loss: called with these, for the metric of that name; None for none. keep: called
    with the ``answer_records``, where they are wanted."""
    answered = sample_and_score(data, sampler, rewards, **how)
    rollout, scored = answered.rollout, answered.scored
    if keep is not None:
        keep(answer_records(answered, rewards.names))
    together = dataclasses.replace(scored, seconds={}, metrics={})
    group_ids = torch.tensor(rollout.group_ids)
    found = completion_metrics(rollout) | reward_metrics(
        rewards.names, together, group_ids, "group"
    )
    return found if loss is None else {"loss": loss(rollout, scored), **found}


def answer_records(answered: Answered, names: Sequence[str]) -> list[dict[str, Any]]:
    """A record of each completion, without an advantage: they are not trained on. names: of the
    reward functions."""
    rollout, scored, examples = answered
    return completion_records(
        rollout,
        prompts=[example.prompt for example in per_completion(rollout, examples)],
        names=names,
        rewards=scored.values,
        total=scored.total,
        extra=scored.extra,
    )


def rollout_loss(
    rollout: Rollout,
    scored: RewardBatch,
    weights: torch.Tensor,
    learner: Learner,
    *,
    estimate: Estimator,
    mask_truncated: bool,
) -> float:
    """The loss that an update on a rollout would begin with, all completions in one batch and the
    policy that sampled them in both places of the ratio: without an entropy bonus and the router's
    loss, which are no losses of completions. Completions without a gradient are not forwarded.

    weights: of the reward functions.
    """
    policy, execution = learner.policy, learner.execution
    group_ids = torch.tensor(rollout.group_ids)
    buffer = RolloutBuffer(rollout, estimate(scored, group_ids, weights), 1, 1)

    def logprobs() -> torch.Tensor:
        return rollout_logprobs(
            policy, buffer, learner.trains, mask_truncated=mask_truncated, execution=execution
        )

    logp = logprobs()
    if learner.options.beta:
        with execution.signals.held(), policy.reference():
            buffer.ref_logp = logprobs()
    samples, places = buffer.part(0, mask_truncated=mask_truncated)
    live = [i for i, sample in enumerate(samples) if learner.trains(sample)]
    if not live:
        return 0.0
    batch, cpu = [samples[i] for i in live], torch.device("cpu")
    lengths = torch.tensor([0, *(sample.own_tokens for sample in batch)])
    loss, _ = learner.policy_loss(
        torch.cat([logp[places[i]] for i in live]),
        torch.tensor([sample.advantage for sample in batch]),
        lengths.cumsum(0),
        old_logp=None,
        ref_logp=concatenated(batch, "ref_logp", cpu),
        mask=loss_mask(batch, cpu),
        sampler_ratio=None,
        entropy=None,
        num_items=sum(sample.loss_tokens for sample in samples),
        num_sequences=len(samples),
    )
    return float(loss)
