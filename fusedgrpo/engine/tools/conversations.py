"""Conversations of a policy with tools: its turns are read, what they call is run, answers written.

All of it is in tokens that are only ever appended: what was sampled is what is trained, whatever a
chat template would make of the same messages.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fusedgrpo.engine.rollout.turns import Answer, Finished, Place
from fusedgrpo.engine.seeding import derive
from fusedgrpo.engine.tools.calls import Turn
from fusedgrpo.engine.tools.types import ToolCall, ToolResult
from fusedgrpo.errors import ToolError, brief

# An answer to what looks like a call and cannot be read names no tool.
UNREADABLE = "unknown"


class Running(Protocol):
    """Whoever runs tools; see ``ToolProcesses``."""

    def open(
        self, key: Hashable, environment: str | None, reset: dict[str, Any], seed: int
    ) -> None: ...
    def observations(self, keys: Iterable[Hashable]) -> list[Any]: ...
    def call(self, key: Hashable, calls: Sequence[ToolCall], seed: int) -> None: ...
    def results(self, *, wait: bool) -> list[tuple[Hashable, list[ToolResult]]]: ...
    def close_key(self, key: Hashable) -> None: ...


@dataclass(frozen=True, slots=True)
class Topic:
    """The beginning of a conversation. prompt_ids: of its prompt. schemas: of the tools that it
    may use. environment: the name of its environment, and reset: what that is given, None where
    there are no environments; words: what it said to that, which is in the prompt."""

    prompt_ids: Sequence[int]
    schemas: Sequence[Mapping[str, Any]]
    environment: str | None = None
    reset: dict[str, Any] | None = None
    words: Any = None


@dataclass(slots=True)
class _Conversation:
    """One completion so far. key: by which its tools go. messages: what the first ``read`` of its
    tokens are. rounds: of calls. last_id: the last token before the answers that it waits for.
    problem: why what it called cannot be read. began: its environment is known to have."""

    key: Hashable
    messages: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    rounds: int = 0
    calls: int = 0
    failures: int = 0
    last_id: int | None = None
    problem: str | None = None
    began: bool = False


def beginning_seed(seed: int, prompt: int) -> int:
    """The seed of the environments of a prompt, by its place in a rollout: all of its completions
    begin alike. seed: of the rollout."""
    return derive(seed, "environment", prompt)


class Conversations:
    """The ``Turns`` of one rollout. Use it as a context manager: its environments live as long.

    topics: of the prompts, the first of which has the place ``first``. parse: a turn from its
    tokens, those before it and the schemas. write: the tokens of tool messages, after a last token.
    most: tokens of a completion. seed: of the rollout. text: of all tokens of a completion.
    most_rounds: how often a completion may call, None for any number.
    """

    def __init__(
        self,
        topics: Sequence[Topic],
        running: Running,
        parse: Callable[[Sequence[int], Sequence[int], Sequence[Mapping[str, Any]]], Turn],
        write: Callable[[Sequence[Mapping[str, Any]], int | None], tuple[int, ...]],
        text: Callable[[Sequence[int]], str],
        *,
        most: int,
        seed: int,
        first: int = 0,
        most_rounds: int | None = None,
    ):
        self.topics = topics
        self.running = running
        self.parse = parse
        self.write = write
        self.text = text
        self.most = most
        self.seed = seed
        self.first = first
        self.most_rounds = most_rounds
        self._going: dict[Place, _Conversation] = {}
        self._waiting: dict[Hashable, Place] = {}
        self._unread: list[Place] = []  # ended with what cannot be read, and nothing to wait for
        self._attempts = 0

    def __enter__(self) -> Conversations:
        return self

    def __exit__(self, *error: object) -> None:
        for conversation in self._going.values():
            self.running.close_key(conversation.key)
        self._going.clear()
        self._waiting.clear()

    def key(self, place: Place) -> Hashable:
        """By which the tools and the environment of a completion go."""
        return self._going[place].key

    def topic(self, place: Place) -> Topic:
        return self.topics[place[0] - self.first]

    def begin(self, place: Place) -> None:
        """See ``Turns``."""
        if earlier := self._going.get(place):
            self._waiting.pop(earlier.key, None)
            self.running.close_key(earlier.key)
        self._unread = [other for other in self._unread if other != place]
        self._attempts += 1
        key = (self.seed, *place, self._attempts)
        self._going[place] = _Conversation(key)
        topic = self.topic(place)
        if topic.reset is not None:
            seed = beginning_seed(self.seed, place[0])
            self.running.open(key, topic.environment, topic.reset, seed)

    def ended(self, place: Place, ids: Sequence[int]) -> bool:
        """See ``Turns``."""
        one = self._going[place]
        turn = self._turn(place, one, ids)
        if not turn.calls and turn.problem is None:
            return False
        if self.most_rounds is not None and one.rounds >= self.most_rounds:
            return False
        if one.rounds == 0 and self.topic(place).reset is not None:
            self._check_beginning(one, self.topic(place))
        one.rounds += 1
        one.last_id = ids[-1]
        one.problem = turn.problem
        if turn.calls:
            self._waiting[one.key] = place
            self.running.call(one.key, turn.calls, derive(self.seed, "tool", *place, one.rounds))
        else:
            self._unread.append(place)
        return True

    def answers(self, *, wait: bool) -> list[tuple[Place, Answer]]:
        """See ``Turns``. Raises ToolError where a tool's failure ends the run."""
        found: list[tuple[Place, Answer]] = [(p, self._answer(p, [])) for p in self._unread]
        self._unread = []
        while self._waiting:
            for key, results in self.running.results(wait=wait and not found):
                place = self._waiting.pop(key, None)
                if place is not None:  # else memory ran out in a completion that began again since
                    found.append((place, self._answer(place, results)))
            if found or not wait:
                break
        return found

    def _answer(self, place: Place, results: Sequence[ToolResult]) -> Answer:
        one = self._going[place]
        results = list(results)
        if one.problem is not None:
            results.append(ToolResult(UNREADABLE, str({"error": one.problem}), failed=True))
        one.calls += len(results)
        one.failures += sum(result.failed for result in results)
        messages = [{"role": "tool", "name": r.name, "content": r.content} for r in results]
        ids = self.write(messages, one.last_id)
        if one.read + len(ids) >= self.most:
            return None  # no room for a word to it: the completion ends with its calls
        one.messages += [
            message if result.value is None else {**message, "content": result.value}
            for message, result in zip(messages, results, strict=True)
        ]
        one.read += len(ids)
        return ids

    def finished(self, place: Place, ids: Sequence[int]) -> Finished:
        """See ``Turns``. Raises ToolError for an environment that could not begin, or that began
        with other words than those in the prompt."""
        one, topic = self._going[place], self.topic(place)
        if one.read < len(ids):  # it was cut off in a turn
            self._turn(place, one, ids)
        if topic.reset is None:
            self.running.close_key(one.key)
        else:
            self._check_beginning(one, topic)
        return Finished(self.text(ids), tuple(one.messages), one.calls, one.failures)

    def _check_beginning(self, one: _Conversation, topic: Topic) -> None:
        """Whether its environment has begun as the prompt says; waits for that."""
        if one.began:
            return
        (words,) = self.running.observations([one.key])
        one.began = True
        if words != topic.words:
            raise ToolError(
                f"The environment's reset returned {brief(words)} for one completion of a prompt "
                f"and {brief(topic.words)} for another. GRPO compares completions of one prompt: "
                "draw what it says from random, numpy.random or torch, which are seeded alike for "
                "all of them, or from the row."
            )

    def _turn(self, place: Place, one: _Conversation, ids: Sequence[int]) -> Turn:
        """Read what was said since."""
        topic = self.topic(place)
        # What a template begins a turn with stands at the end of what was before it.
        before = ids[: one.read] if one.read else topic.prompt_ids
        turn = self.parse(ids[one.read :], before, topic.schemas)
        one.messages.append(turn.message)
        one.read = len(ids)
        return turn
