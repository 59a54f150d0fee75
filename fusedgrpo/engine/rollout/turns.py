"""Completions of several turns: what samplers ask of whoever answers the policy between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from fusedgrpo.engine.rollout.types import Completion, Group

# The tokens of an answer; None where the completion is over instead.
Answer = tuple[int, ...] | None
Place = tuple[int, int]  # the place of a prompt among those of a rollout, and of its completion


class Finished(NamedTuple):
    """A completion that is over: its text, the messages that it is, how many calls were answered,
    and how many of the answers are errors."""

    text: str
    messages: tuple[dict[str, Any], ...]
    calls: int
    failures: int


class Turns(Protocol):
    """Answers the policy, in tokens. Completions go by their ``Place``, and each has a state of its
    own. All but ``answers`` return at once. An answer leaves room for a word to it."""

    def begin(self, place: Place) -> None:
        """A completion begins; once more, from nothing, where memory ran out in it."""

    def ended(self, place: Place, ids: Sequence[int]) -> bool:
        """A turn of the policy's is over; ids: all tokens of the completion, with what was given.
        True: an answer will come."""

    def answers(self, *, wait: bool) -> list[tuple[Place, Answer]]:
        """The answers that have come since. wait: for one, where any will come."""

    def finished(self, place: Place, ids: Sequence[int]) -> Finished:
        """A completion is over, with these tokens; asked once of each."""


def of_turns(
    completion: Completion, given: Sequence[tuple[int, int]], place: Place, turns: Turns
) -> Completion:
    """``completion``, which is over, with all that is known of its turns."""
    text, messages, calls, failures = turns.finished(place, completion.ids)
    return dataclasses.replace(
        completion,
        text=text,
        given=tuple(given),
        messages=messages,
        calls=calls,
        failures=failures,
    )


@dataclass
class _Unfinished:
    """A completion so far: its turns one after the other."""

    place: Place
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    logp: list[torch.Tensor | None] = field(default_factory=list)
    given: list[tuple[int, int]] = field(default_factory=list)
    last: Completion | None = None


# From conversations, the number of the round and the tokens that one of them has room for.
SampleOnce = Callable[[Sequence[Sequence[int]], int, int], list[Completion]]


def turn_by_turn(
    groups: Sequence[Group],
    sample_once: SampleOnce,
    turns: Turns,
    most: int,
    first: int,
) -> list[Group]:
    """Completions of several turns, from the ``groups`` of first ones: of those that get an answer,
    all second turns are sampled after their whole conversations, and so on.

    sample_once: the turns that follow. most: tokens of a completion. first: the place of the first
    prompt.
    """
    going: list[_Unfinished] = []
    for i, group in enumerate(groups):
        for k, completion in enumerate(group.completions):
            one = _Unfinished((first + i, k), group.prompt_ids)
            turns.begin(one.place)
            _take(one, completion)
            going.append(one)
    everything = list(going)
    number = 0
    while going := _answered(going, turns, most):
        number += 1
        room = most - min(len(one.ids) for one in going)
        said = sample_once([[*one.prompt, *one.ids] for one in going], number, room)
        for one, completion in zip(going, said, strict=True):
            _take(one, _cut(completion, most - len(one.ids)))
    whole = {one.place: _whole(one, turns) for one in everything}
    return [
        dataclasses.replace(
            group,
            completions=tuple(whole[first + i, k] for k in range(len(group.completions))),
        )
        for i, group in enumerate(groups)
    ]


def _take(one: _Unfinished, completion: Completion) -> None:
    one.ids += completion.ids
    one.logp.append(completion.logp)
    one.last = completion


def _answered(going: Sequence[_Unfinished], turns: Turns, most: int) -> list[_Unfinished]:
    """The completions that go on, with what they were given."""
    waiting = {
        one.place: one for one in going if len(one.ids) < most and turns.ended(one.place, one.ids)
    }
    further: list[_Unfinished] = []
    while waiting:
        for place, answer in turns.answers(wait=True):
            one = waiting.pop(place)
            if answer is None:
                continue
            one.given.append((len(one.ids), len(one.ids) + len(answer)))
            one.ids += answer
            further.append(one)
    return sorted(further, key=lambda one: one.place)


def _cut(completion: Completion, most: int) -> Completion:
    """The first ``most`` tokens of a turn that was sampled beside others with more room."""
    if len(completion.ids) <= most:
        return completion
    logp = None if completion.logp is None else completion.logp[:most]
    return dataclasses.replace(
        completion, ids=completion.ids[:most], logp=logp, finish_reason="length"
    )


def _whole(one: _Unfinished, turns: Turns) -> Completion:
    assert one.last is not None
    logp = None
    if all(part is not None for part in one.logp):
        logp = torch.cat([part for part in one.logp if part is not None])
    return of_turns(
        Completion(tuple(one.ids), "", one.last.finish_reason, logp), one.given, one.place, turns
    )
