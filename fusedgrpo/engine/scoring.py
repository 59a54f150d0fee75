"""What a rollout is given before it is trained on: rewards, old and reference log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.data import Example
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout import Rollout
from fusedgrpo.engine.samples import micro_batches
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
