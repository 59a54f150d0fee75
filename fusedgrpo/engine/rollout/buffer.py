"""The rollout that a run is working through: sampled, scored, and partly trained on.

It serves ``steps`` optimizer steps, ``iterations`` times over, and is part of every checkpoint: a
run that was stopped in the middle goes on with the very same completions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.rollout.types import Completion, Group, Rollout


@dataclass(slots=True)
class RolloutBuffer:
    """rollout: B completions. advantages: ``[B]`` float32. old_logp, ref_logp, sampler_weight:
    ``[N]`` float32 over all tokens that the policy wrote, flat order, or None; log-probs are NaN
    for completions that no gradient needs them of. rewards: ``[B]`` float32, the weighted sums, or
    None. numbers: of its groups among all that were sampled for it, None where they are all.
    metrics: of the rollout, repeated on each of its steps. done: optimizer steps taken so far. All
    tensors on the CPU.
    """

    rollout: Rollout
    advantages: Tensor
    steps: int
    iterations: int
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_weight: Tensor | None = None
    rewards: Tensor | None = None
    numbers: list[int] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done >= self.steps * self.iterations

    def next_samples(self, *, mask_truncated: bool) -> list[TrainingSample]:
        """The samples of the next optimizer step: whole groups, as evenly as they divide."""
        return self.part(self.done % self.steps, mask_truncated=mask_truncated)[0]

    def part(self, part: int, *, mask_truncated: bool) -> tuple[list[TrainingSample], list[slice]]:
        """The samples of one step out of ``steps``, and where in ``[N]`` their tokens are."""
        chosen = self._groups_of(part)
        samples, places = [], []
        token = 0
        for index, (group_id, completion) in enumerate(
            zip(self.rollout.group_ids, self.rollout.completions(), strict=True)
        ):
            rows = slice(token, token + completion.own_tokens)
            token = rows.stop
            if group_id not in chosen:
                continue
            places.append(rows)
            samples.append(
                TrainingSample(
                    prompt_ids=self.rollout.groups[group_id].prompt_ids,
                    completion_ids=completion.ids,
                    advantage=float(self.advantages[index]),
                    in_loss=not (mask_truncated and completion.finish_reason == "length"),
                    old_logp=None if self.old_logp is None else self.old_logp[rows],
                    ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
                    sampler_logp=completion.logp,
                    sampler_weight=None
                    if self.sampler_weight is None
                    else self.sampler_weight[rows],
                    given=completion.given,
                )
            )
        return samples, places

    def indices(self, part: int) -> list[int]:
        """The samples of one step out of ``steps`` by their places in ``[B]``."""
        chosen = self._groups_of(part)
        return [index for index, group in enumerate(self.rollout.group_ids) if group in chosen]

    def _groups_of(self, part: int) -> range:
        groups = len(self.rollout.groups)
        return range(groups * part // self.steps, groups * (part + 1) // self.steps)

    def only(self, indices: Sequence[int]) -> RolloutBuffer:
        """The completions at some places of ``[B]``, ascending, as the samples of a single step;
        without log-probs."""
        completions = list(self.rollout.completions())
        members: dict[int, list[Completion]] = {}
        for index in indices:
            members.setdefault(self.rollout.group_ids[index], []).append(completions[index])
        groups = [
            dataclasses.replace(self.rollout.groups[group], completions=tuple(own))
            for group, own in members.items()
        ]
        return RolloutBuffer(Rollout(tuple(groups)), self.advantages[list(indices)], 1, 1)

    def logged_at(self, index: int) -> tuple[int, int]:
        """The group and the place, among all that were sampled, of a completion of ``[B]``."""
        group = self.rollout.group_ids[index]
        number = group if self.numbers is None else self.numbers[group]
        return number, index + (number - group) * len(self.rollout.groups[group].completions)

    def row_at(self, token: int) -> int:
        """The data row of the completion that has this token of ``[N]``."""
        end = 0
        for group in self.rollout.groups:
            end += sum(completion.own_tokens for completion in group.completions)
            if token < end:
                return group.row
        raise IndexError(f"token {token} of {end}")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as tensors for safetensors and values for JSON."""
        completions = list(self.rollout.completions())
        tensors = {"advantages": self.advantages}
        for name in ("old_logp", "ref_logp", "sampler_weight", "rewards"):
            if (value := getattr(self, name)) is not None:
                tensors[name] = value
        tensors["sampler_logp"] = sampler_logp(completions)
        values = {
            "steps": self.steps,
            "iterations": self.iterations,
            "done": self.done,
            "metrics": self.metrics,
            "numbers": self.numbers,
            "groups": [
                {
                    "row": group.row,
                    "prompt_ids": group.prompt_ids,
                    "completions": [
                        {
                            "ids": c.ids,
                            "text": c.text,
                            "finish_reason": c.finish_reason,
                            "given": c.given,
                            "messages": c.messages,
                            "calls": c.calls,
                            "failures": c.failures,
                        }
                        for c in group.completions
                    ],
                }
                for group in self.rollout.groups
            ],
            "has_logp": [c.logp is not None for c in completions],
        }
        return tensors, values

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], values: dict[str, Any]) -> RolloutBuffer:
        """The inverse of ``state``."""
        logp = tensors["sampler_logp"]
        has_logp = iter(values["has_logp"])
        token = 0
        groups = []
        for group in values["groups"]:
            completions = []
            for c in group["completions"]:
                messages = c.get("messages")
                whole = Completion(
                    tuple(c["ids"]),
                    c["text"],
                    c["finish_reason"],
                    given=tuple((start, stop) for start, stop in c.get("given", ())),
                    messages=None if messages is None else tuple(messages),
                    calls=c.get("calls", 0),
                    failures=c.get("failures", 0),
                )
                rows = slice(token, token + whole.own_tokens)
                token = rows.stop
                own = logp[rows].clone() if next(has_logp) else None
                completions.append(dataclasses.replace(whole, logp=own))
            groups.append(Group(group["row"], tuple(group["prompt_ids"]), tuple(completions)))
        return cls(
            rollout=Rollout(tuple(groups)),
            advantages=tensors["advantages"],
            steps=values["steps"],
            iterations=values["iterations"],
            old_logp=tensors.get("old_logp"),
            ref_logp=tensors.get("ref_logp"),
            sampler_weight=tensors.get("sampler_weight"),
            rewards=tensors.get("rewards"),
            numbers=values.get("numbers"),
            metrics=values["metrics"],
            done=values["done"],
        )


def sampler_logp(completions: Sequence[Completion]) -> Tensor:
    """``[N]`` float32 of all completions end to end, NaN where the sampler did not say."""
    parts = [
        torch.full((c.own_tokens,), math.nan) if c.logp is None else c.logp for c in completions
    ]
    return torch.cat(parts) if parts else torch.zeros(0)
