"""Conversations by themselves: tools are a list of answers, tokens words of a made-up script."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fusedgrpo.engine.tools.conversations import Conversations, Topic
from fusedgrpo.engine.tools.types import ToolCall, ToolResult
from fusedgrpo.errors import ToolError

CALL, BROKEN, END = 50, 51, 1


@dataclass
class Running:
    """Tools that answer with what is put into ``ready``; notes all that is asked of it."""

    ready: list[tuple[Hashable, list[ToolResult]]] = field(default_factory=list)
    calls: list[tuple[Hashable, int]] = field(default_factory=list)
    opened: list[tuple[Hashable, int]] = field(default_factory=list)
    closed: list[Hashable] = field(default_factory=list)
    words: str | None = None

    def open(
        self, key: Hashable, environment: str | None, reset: dict[str, Any], seed: int
    ) -> None:
        self.opened.append((key, seed))

    def observations(self, keys: Any) -> list[Any]:
        return [self.words for _ in keys]

    def call(self, key: Hashable, calls: Sequence[ToolCall], seed: int) -> None:
        self.calls.append((key, seed))

    def results(self, *, wait: bool) -> list[tuple[Hashable, list[ToolResult]]]:
        found, self.ready = self.ready, []
        return found

    def close_key(self, key: Hashable) -> None:
        self.closed.append(key)

    def answer(self, number: int = -1, text: str = "4", *, failed: bool = False) -> None:
        self.ready.append((self.calls[number][0], [ToolResult("f", text, failed)]))


@dataclass
class Said:
    message: dict[str, Any]
    calls: tuple[ToolCall, ...] = ()
    problem: str | None = None


def parse(ids: Sequence[int], before: Sequence[int], schemas: Any) -> Said:
    message = {"role": "assistant", "content": " ".join(map(str, ids)), "before": list(before)}
    if CALL in ids:
        return Said(message, (ToolCall("f", {}),))
    return Said(message, problem="half a call" if BROKEN in ids else None)


def write(messages: Sequence[Any], last_id: int | None) -> tuple[int, ...]:
    return tuple(ord(c) for m in messages for c in m["content"][:4])


def talks(running: Running, topics: int = 2, **options: Any) -> Conversations:
    reset = options.pop("reset", None)
    return Conversations(
        [Topic((7, 8), (), None, reset, options.pop("words", None)) for _ in range(topics)],
        running,
        parse,
        write,
        lambda ids: " ".join(map(str, ids)),
        **{"most": 20, "seed": 3, "first": 5} | options,
    )


def test_a_call_is_answered_and_what_is_told_is_appended() -> None:
    running = Running()
    with talks(running) as talk:
        talk.begin((5, 0))
        assert talk.ended((5, 0), [9, CALL, END])
        assert talk.answers(wait=False) == []
        running.answer(text="42")
        assert talk.answers(wait=True) == [((5, 0), (ord("4"), ord("2")))]
        ids = [9, CALL, END, ord("4"), ord("2"), 11, END]
        assert not talk.ended((5, 0), ids)
        said = talk.finished((5, 0), ids)
    assert [m["role"] for m in said.messages] == ["assistant", "tool", "assistant"]
    assert [m.get("before") for m in said.messages] == [[7, 8], None, ids[:5]]
    assert said.messages[2]["content"] == f"11 {END}"
    assert (said.calls, said.failures) == (1, 0)
    assert said.text == " ".join(map(str, ids))
    assert running.closed == [running.calls[0][0]] * 2


def test_each_call_has_a_seed_of_its_own_and_the_same_again() -> None:
    def seeds() -> list[int]:
        running = Running()
        with talks(running) as talk:
            for place in ((5, 0), (5, 1), (6, 0)):
                talk.begin(place)
                assert talk.ended(place, [CALL])
                running.answer()
                talk.answers(wait=True)
            assert talk.ended((5, 0), [CALL, ord("4"), CALL])
        return [seed for _, seed in running.calls]

    assert seeds() == seeds() and len(set(seeds())) == 4


def test_what_cannot_be_read_is_answered_at_once() -> None:
    running = Running()
    with talks(running) as talk:
        talk.begin((5, 0))
        assert talk.ended((5, 0), [BROKEN, END])
        assert talk.answers(wait=False) == [((5, 0), tuple(map(ord, "{'er")))]
        said = talk.finished((5, 0), [BROKEN, END, *map(ord, "{'er"), 2])
    assert not running.calls
    assert "half a call" in said.messages[1]["content"] and said.failures == said.calls == 1


def test_an_answer_without_room_ends_the_completion_with_its_call() -> None:
    running = Running()
    with talks(running, most=6) as talk:
        talk.begin((5, 0))
        talk.ended((5, 0), [CALL, END])
        running.answer(text="1234")
        assert talk.answers(wait=True) == [((5, 0), None)]
        said = talk.finished((5, 0), [CALL, END])
    assert [m["role"] for m in said.messages] == ["assistant"] and said.calls == 1


def test_after_so_many_rounds_a_call_ends_it() -> None:
    running = Running()
    with talks(running, most_rounds=1) as talk:
        talk.begin((5, 0))
        assert talk.ended((5, 0), [CALL])
        running.answer()
        talk.answers(wait=True)
        assert not talk.ended((5, 0), [CALL, ord("4"), CALL])
    assert len(running.calls) == 1


def test_one_that_begins_again_hears_nothing_of_what_it_asked_before() -> None:
    running = Running()
    with talks(running, reset={"row": 1}) as talk:
        talk.begin((5, 0))
        talk.ended((5, 0), [CALL])
        talk.begin((5, 1))
        talk.ended((5, 1), [BROKEN])
        for place in ((5, 0), (5, 1)):
            talk.begin(place)
        running.answer(0)
        assert talk.answers(wait=False) == []
        assert not talk.ended((5, 0), [END])
        assert len(talk.finished((5, 0), [END]).messages) == 1
        keys = [key for key, _ in running.opened]
        assert running.closed == [keys[0], keys[1]]
        assert len({seed for _, seed in running.opened}) == 1, "those of a prompt begin alike"
    assert sorted(map(str, running.closed)) == sorted(map(str, keys)), "none is left open"


def test_a_turn_that_was_cut_off_is_a_message() -> None:
    running = Running()
    with talks(running) as talk:
        talk.begin((5, 0))
        said = talk.finished((5, 0), [9, 10, CALL])
    assert [m["content"] for m in said.messages] == [f"9 10 {CALL}"] and said.calls == 0


def test_other_first_words_are_an_error() -> None:
    running = Running(words="odd")
    with talks(running, reset={}, words="even") as talk:
        talk.begin((5, 0))
        with pytest.raises(ToolError, match=r"'odd' for one completion.*'even' for another"):
            talk.ended((5, 0), [CALL])


def test_rewards_get_a_tools_list_and_the_policy_its_text() -> None:
    running = Running()
    with talks(running) as talk:
        talk.begin((5, 0))
        talk.ended((5, 0), [CALL])
        key, _ = running.calls[0]
        running.ready.append((key, [ToolResult("f", "[(1)", value=[[1]]), ToolResult("g", "2")]))
        ids = [CALL, *map(ord, "[(1)2")]
        assert talk.answers(wait=True) == [((5, 0), tuple(ids[1:]))]
        said = talk.finished((5, 0), ids)
    assert [message["content"] for message in said.messages[1:]] == [[[1]], "2"]
