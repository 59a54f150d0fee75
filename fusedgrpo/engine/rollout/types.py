"""The result of a sampler: ``Rollout[Group[prompt, Completion]]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

FinishReason = Literal["stop", "length"]
# Whether a group teaches anything; asked with False, None while that is not known, with True it
# waits for it.
Verdict = Callable[[bool], bool | None]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    ids: the sampled tokens, the EOS that ended it included, and what was given to the policy
        between its turns, such as answers of tools.
    text: ``ids`` decoded, without special tokens unless ``skip_special_tokens`` is false.
    finish_reason: ``"stop"`` if an EOS id was sampled, or a stop text was said, ``"length"`` only
        if the limit cut it.
    logp: float32 ``[own_tokens]``, log-probability under the distribution that was sampled from
        (temperature, top-k, structured outputs, ... applied), or None where the sampler does not
        know it.
    given: the half-open spans of ``ids`` that the policy did not write, ascending. They carry no
        loss, and are in no denominator.
    messages: the conversation that it is, where it has turns: of the assistant and of tools.
    calls: of tools that were answered; failures: those that were answered with an error.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logp: torch.Tensor | None = None
    given: tuple[tuple[int, int], ...] = ()
    messages: tuple[dict[str, Any], ...] | None = None
    calls: int = 0
    failures: int = 0

    @property
    def own_tokens(self) -> int:
        """How many tokens the policy wrote."""
        return len(self.ids) - sum(stop - start for start, stop in self.given)


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
