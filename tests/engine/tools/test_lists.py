"""What a conversation makes of its tools' answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedgrpo.engine.tools.calls import Turn
from fusedgrpo.engine.tools.conversations import Conversations, Topic
from fusedgrpo.engine.tools.types import ToolCall, ToolResult


class Answering:
    """Runs nothing, and answers the first turn of all."""

    def __init__(self, results: list[ToolResult]):
        self.ready = results
        self.keys: list[Any] = []

    def call(self, key: Any, calls: Sequence[ToolCall], seed: int) -> None:
        self.keys.append(key)

    def results(self, *, wait: bool) -> list[tuple[Any, list[ToolResult]]]:
        return [(key, self.ready) for key in self.keys]

    def close_key(self, key: Any) -> None:
        pass


def test_rewards_get_a_tools_list_and_the_policy_its_text() -> None:
    written: list[Any] = []

    def parse(ids: Sequence[int], before: Sequence[int], schemas: Any) -> Turn:
        return Turn({"role": "assistant", "content": ""}, (ToolCall("f", {}), ToolCall("g", {})))

    def write(messages: Sequence[Any], last_id: int | None) -> tuple[int, ...]:
        written.extend(messages)
        return (7, 8)

    running: Any = Answering(
        [ToolResult("f", "[(1, 'a')]", value=[[1, "a"]]), ToolResult("g", "2")]
    )
    with Conversations(
        [Topic([1], [])], running, parse, write, lambda ids: "", most=20, seed=0
    ) as talk:
        talk.begin((0, 0))
        assert talk.ended((0, 0), [5, 6])
        assert talk.answers(wait=True) == [((0, 0), (7, 8))]
        messages = talk.finished((0, 0), [5, 6, 7, 8]).messages
    assert [message["content"] for message in written] == ["[(1, 'a')]", "2"]
    assert [message["content"] for message in messages[1:]] == [[[1, "a"]], "2"]
