"""Rewards, advantages, old and reference log-probs of a rollout, before it is trained on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.advantages import Estimator
from fusedgrpo.engine.asking import Questions
from fusedgrpo.engine.data.dataset import Example
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rewards.scorers import Scoring
from fusedgrpo.engine.rollout.buffer import RolloutBuffer, sampler_logp
from fusedgrpo.engine.rollout.metrics import (
    completion_metrics,
    mismatch_metrics,
    reward_metrics,
    weight_metrics,
)
from fusedgrpo.engine.rollout.training_sample import TrainingSample, has_gradient
from fusedgrpo.engine.rollout.types import Rollout
from fusedgrpo.engine.seeding import derive, seeded
from fusedgrpo.errors import NonFiniteError
from fusedgrpo.kernels import LossOptions
from fusedgrpo.loss_options import LOSS_TYPES
from fusedgrpo.models.micro_batches import Pair, longest, micro_batches, shares
from fusedgrpo.models.policy import Policy


def per_completion(rollout: Rollout, examples: Sequence[Example]) -> list[Example]:
    """``[B]``: the example that each completion answers."""
    return [examples[group] for group in rollout.group_ids]


def score_rollout(
    rewards: RewardFunctions,
    rollout: Rollout,
    questions: Questions,
    *,
    conversational: bool,
    column_names: Sequence[str],
    state: SimpleNamespace,
    seed: int,
    processes: Processes,
    alone: bool = False,
) -> list[RewardBatch]:
    """Call the reward functions, by TRL's convention: strings for plain prompts, lists with one
    assistant message for conversational ones, or with all messages where there are tools, and every
    other column of the data by its name.

    Each process scores its share of the groups, with random generators seeded from ``seed``; the
    batches of all processes, which are of the rollout end to end. alone: each group is scored by
    itself, from a seed of its own, and what it gets does not depend on which are scored with it: a
    batch for each.
    """
    own = processes.share(len(rollout.groups))

    def score_some(some: range, own_seed: int) -> RewardBatch:
        with seeded(own_seed):
            return begin_scoring(
                rewards,
                Rollout(rollout.groups[some.start : some.stop]),
                questions,
                some,
                conversational=conversational,
                column_names=column_names,
                state=state,
            ).finish()

    def score() -> list[RewardBatch]:
        if alone:
            first = questions.first
            return [score_some(range(i, i + 1), group_seed(seed, first + i)) for i in own]
        if own or not rollout.groups:
            return [score_some(own, processes.derive(seed))]
        width = len(rewards.names)
        return [RewardBatch(torch.zeros(0, width), torch.zeros(0), {}, {}, {}, 0)]

    return [batch for batches in processes.run_everywhere(score) for batch in batches]


def group_seed(seed: int, place: int) -> int:
    """For a group that is scored by itself, by its place in the rollout."""
    return derive(seed, "group", place)


def begin_scoring(
    rewards: RewardFunctions,
    rollout: Rollout,
    questions: Questions,
    some: range,
    *,
    conversational: bool,
    column_names: Sequence[str],
    state: SimpleNamespace,
) -> Scoring[RewardBatch]:
    """Have ``rollout`` scored, the groups that are the answers to ``some`` of the questions."""
    asked = per_completion(rollout, questions.examples[some.start : some.stop])
    texts: list[Any] = [
        completion.text
        if completion.messages is None and not conversational
        else list(completion.messages or [{"role": "assistant", "content": completion.text}])
        for completion in rollout.completions()
    ]
    places = [
        (questions.first + some.start + g, k)
        for g, group in enumerate(rollout.groups)
        for k in range(len(group.completions))
    ]
    return rewards.begin(
        prompts=[example.prompt for example in asked],
        completions=texts,
        completion_ids=[list(completion.ids) for completion in rollout.completions()],
        columns={name: [example.columns[name] for example in asked] for name in column_names}
        | {name: [values[p] for p in places] for name, values in questions.columns.items()},
        trainer_state=state,
        rows=[example.row for example in asked],
        environments=questions.acted(places),
    )


def rollout_logprobs(
    policy: Policy,
    buffer: RolloutBuffer,
    needs: Callable[[TrainingSample], bool],
    *,
    mask_truncated: bool,
    execution: Execution,
    refuses: bool = True,
) -> Tensor:
    """Log-probs ``[N]`` float32 on the CPU of the completions that ``needs`` names, NaN for others,
    without gradients. refuses: raise NonFiniteError where one is not finite.

    The same route and the same cut, into processes and micro-batches, as the update, so that an
    update which comes first finds ratios of exactly 1. Call it inside ``policy.reference()`` for
    the reference's.
    """

    processes = execution.processes
    logp = torch.full((sum(c.own_tokens for c in buffer.rollout.completions()),), torch.nan)

    def score(pairs: Sequence[Pair], places: Sequence[slice]) -> None:
        cut = micro_batches(pairs, execution.oom_retry.tokens, policy.layout, whole=policy.whole)
        found: list[Tensor] = []
        for members in cut:
            execution.check_interrupt()
            found.append(policy.logprobs(policy.pack([pairs[k] for k in members])).logp)
        # Only now, when nothing is left to start, wait for the device.
        for members, batch in zip(cut, found, strict=True):
            sizes = [places[k].stop - places[k].start for k in members]
            for k, values in zip(members, batch.cpu().split(sizes), strict=True):
                logp[places[k]] = values

    def score_own() -> Tensor:
        for part in range(buffer.steps):
            samples, places = buffer.part(part, mask_truncated=mask_truncated)
            chosen = [i for i, sample in enumerate(samples) if needs(sample)]
            own = shares([samples[i].pair for i in chosen], processes.size)[processes.rank]
            chosen = chosen[own.start : own.stop]
            pairs = [samples[i].pair for i in chosen]
            execution.oom_retry.update(
                functools.partial(score, pairs, [places[i] for i in chosen]),
                functools.partial(longest, pairs, whole=policy.whole),
                "scoring",
            )
            for i in chosen:
                if refuses and not logp[places[i]].isfinite().all():
                    raise NonFiniteError(
                        f"The log-probs of completion {i} of part {part} (data row "
                        f"{buffer.row_at(places[i].start)}) are not finite: NaN or infinity in the "
                        "weights or in what the model computes from this text."
                    )
        return logp

    with policy.passes():
        whole, *others = processes.run_everywhere(score_own)
    for theirs in others:
        whole = torch.where(whole.isnan(), theirs, whole)
    return whole


def make_buffer(
    rollout: Rollout,
    rewards: RewardBatch,
    functions: RewardFunctions,
    policy: Policy,
    config: GRPOConfig,
    *,
    estimate: Estimator,
    steps: int,
    execution: Execution,
) -> RolloutBuffer:
    """Advantages, and the log-probs that the loss will compare with, of a scored rollout."""
    group_ids = torch.tensor(rollout.group_ids)
    advantages = estimate(rewards, group_ids, functions.weights)
    metrics = completion_metrics(rollout) | reward_metrics(
        functions.names, rewards, group_ids, config.scale_rewards
    )
    buffer = RolloutBuffer(
        *(rollout, advantages, steps, config.num_iterations),
        rewards=rewards.total.clone(),  # an estimator may hand it back as the advantages
        metrics=metrics,
    )
    options, truncated = loss_options(config), config.mask_truncated_completions
    bonus = config.entropy_coef or config.use_adaptive_entropy
    custom = config.loss_type not in LOSS_TYPES

    def trains(sample: TrainingSample) -> bool:
        return policy.whole or has_gradient(sample, options, bonus, custom=custom)

    def logprobs(needs: Callable[[TrainingSample], bool] = trains) -> Tensor:
        return rollout_logprobs(
            policy,
            buffer,
            needs,
            mask_truncated=truncated,
            execution=execution,
        )

    # One update on its own rollout needs no old log-probs: they are the policy's own.
    if steps * config.num_iterations > 1 or config.sampler_correction:
        buffer.old_logp = logprobs()
        sampled = sampler_logp(list(rollout.completions()))
        metrics |= mismatch_metrics(sampled, buffer.old_logp)
        if config.sampler_correction:
            weight = (buffer.old_logp - sampled).exp().clamp(max=config.sampler_correction_cap)
            metrics |= weight_metrics(weight)
            # Where nothing was scored nothing has a gradient: the tokens count, whatever weight.
            buffer.sampler_weight = torch.where(buffer.old_logp.isnan(), 1.0, weight)
    samples = [s for k in range(steps) for s in buffer.part(k, mask_truncated=truncated)[0]]
    if samples and not any(map(trains, samples)):
        # Nothing will be forwarded: that the sampler is the policy is still asked of one of them.
        shortest = min(samples, key=lambda s: len(s.prompt_ids) + len(s.completion_ids))
        sampled = sampler_logp(list(rollout.completions()))
        metrics |= mismatch_metrics(sampled, logprobs(lambda s: s.pair == shortest.pair))
    if config.beta:
        # Weights may be swapped for it: held, they come back whatever signal there is.
        with execution.signals.held(), policy.reference():
            buffer.ref_logp = logprobs()
    return buffer


def loss_options(config: GRPOConfig) -> LossOptions:
    """The loss of a configuration. One of the user's own shares with ``dapo`` what it divides by,
    the number of the step's tokens."""
    names = (field.name for field in dataclasses.fields(LossOptions))
    values = {name: getattr(config, name) for name in names}
    if config.loss_type not in LOSS_TYPES:
        values["loss_type"] = "dapo"
    return LossOptions(**values)
