"""The result of a sampler: ``Rollout[Group[prompt, Completion]]``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    ids: the sampled tokens, the EOS that ended it included.
    text: ``ids`` decoded, without special tokens unless ``skip_special_tokens`` is false.
    finish_reason: ``"stop"`` if an EOS id was sampled, or a stop text was said, ``"length"`` only
        if the limit cut it.
    logp: float32 ``[len(ids)]``, log-probability under the distribution that was sampled from
        (temperature, top-k, ... applied), or None where the sampler does not know it.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logp: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and its G completions. ``row`` is the prompt's row in the data set."""

    row: int
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class Rollout:
    """The groups that were sampled in one go. Flat order everywhere: group by group."""

    groups: tuple[Group, ...]

    def completions(self) -> Iterator[Completion]:
        """All B completions, group by group."""
        for group in self.groups:
            yield from group.completions

    @property
    def group_sizes(self) -> list[int]:
        return [len(group.completions) for group in self.groups]

    @property
    def group_ids(self) -> list[int]:
        """``[B]``: the index of the group that each completion belongs to."""
        return [g for g, size in enumerate(self.group_sizes) for _ in range(size)]
