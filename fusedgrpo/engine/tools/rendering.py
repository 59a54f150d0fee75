"""From the answers of tools to the tokens that a policy gets to see."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.tools.probes import QUESTION, call_id, calling_turns, common_start
from fusedgrpo.engine.tools.types import ToolCall
from fusedgrpo.errors import ConfigError, reason
from fusedgrpo.models.tokenizer import special_tokens

_KEPT = 256  # answers whose tokens are remembered: the completions of a group ask much the same
# An argument of a call, and the content of an answer, written in two ways that differ at the end
# and at the beginning: tokens that are the same for both lie behind the first, before the second.
_ARGUMENTS = ("fusedgrpo first", "fusedgrpo other")
_ANSWERS = ("first fusedgrpo answer", "other fusedgrpo answer")

# Names and contents of the answers to one turn.
Answers = tuple[tuple[str, str], ...]


class ToolTurns:
    """The tokens of tools' answers, as a chat template writes them.

    A small conversation is rendered each time, never the one that is going on: tokens that were
    sampled stay what they are, whatever the template would make of them now, and the cost does not
    grow with the conversation.

    end_ids: the tokens that end a turn of the policy. Raises ConfigError for a template that cannot
    render answers, or leaves them out.
    """

    def __init__(self, chat: ChatTemplate, end_ids: Collection[int]):
        self._chat = chat
        self._ends = {*end_ids, *self._written_end()}
        self._cut = lru_cache(_KEPT)(self._found_cut)
        self._rest = lru_cache(_KEPT)(self._found_rest)
        for count in (1, 2):
            self._cut(("probe_tool",) * count)

    def suffix(self, messages: Sequence[Mapping[str, Any]], last_id: int | None) -> tuple[int, ...]:
        """The tokens that follow a turn with calls: their answers, and how the next turn begins.

        messages: ``{"role": "tool", "name": .., "content": text}`` for each call of the turn.
        last_id: the last token of the turn. If that is not the one by which the template ends a
        turn with calls, the suffix begins with it: a stop text may have ended the turn.
        Raises ConfigError where the template has no way to write these answers.
        """
        rest = self._rest(
            tuple((_plain(message["name"]), _whole(message["content"])) for message in messages)
        )
        return rest[1:] if rest[0] == last_id and last_id in self._ends else rest

    def _found_rest(self, answers: Answers) -> tuple[int, ...]:
        turn, head = self._cut(tuple(name for name, _ in answers))
        ids = self._chat.ids([QUESTION, turn, *_messages(answers)])
        if tuple(ids[: len(head)]) != head:
            raise ConfigError(
                "tools: the chat template writes a turn with calls differently, depending on what "
                "the tools answer: what follows the turn cannot be told from it."
            )
        return tuple(ids[len(head) :])

    def _found_cut(self, names: tuple[str, ...]) -> tuple[dict[str, Any], tuple[int, ...]]:
        """A turn with calls of these tools, and the conversation's tokens up to its end."""
        answers: list[Answers] = [
            tuple((name, f"{answer} {place}") for place, name in enumerate(names))
            for answer in _ANSWERS
        ]
        failed = "it leaves them out"
        for turn, other in zip(*(_turns(names, argument) for argument in _ARGUMENTS), strict=True):
            before = [QUESTION, turn]
            try:
                text = self._chat.text([*before, *_messages(answers[0])])
            except Exception as error:  # noqa: BLE001 - templates are other people's code
                failed = reason(error)
                continue
            if _ARGUMENTS[0] not in text or any(content not in text for _, content in answers[0]):
                continue
            ids = self._chat.ids([*before, *_messages(answers[0])])
            shared = self._chat.ids([QUESTION, other, *_messages(answers[0])])
            answered = self._chat.ids([*before, *_messages(answers[1])])
            first = len(ids) - common_start(ids[::-1], shared[::-1])
            last = common_start(ids, answered)
            ends = (at for at in range(first, last) if ids[at] in self._ends)
            bare = common_start(ids, self._chat.ids(before, generation_prompt=False))
            end = next(ends, min(bare, last))
            if end >= first:
                return turn, tuple(ids[:end])
            failed = "where a turn with calls ends cannot be told"
        raise ConfigError(
            f"tools: the chat template cannot write answers of tools, {len(names)} of a turn: "
            f"{failed}. Give the tokenizer a chat template that writes messages of the role `tool`."
        )

    def _written_end(self) -> list[int]:
        """The special token by which the template ends a turn of the assistant's, if any."""
        try:
            one, other = (
                self._chat.ids([QUESTION, {"role": "assistant", "content": text}, QUESTION])
                for text in _ARGUMENTS
            )
        except Exception:  # noqa: BLE001 - templates are other people's code
            return []
        special = special_tokens(self._chat.tokenizer)
        behind = one[len(one) - common_start(one[::-1], other[::-1]) :]
        return [token for token in behind if token in special][:1]


def _turns(names: tuple[str, ...], argument: str) -> Iterator[dict[str, Any]]:
    """Turns that call these tools, as one template or another can write them; last, for one that
    writes answers and no calls, a turn that does not."""
    yield from calling_turns([ToolCall(name, {"probe": argument}) for name in names])
    yield {"role": "assistant", "content": argument}


def _messages(answers: Answers) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "name": name, "content": content, "tool_call_id": call_id(place)}
        for place, (name, content) in enumerate(answers)
    ]


def _plain(name: str) -> str:
    """The name as templates take it: a policy may have called whatever it liked."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[:64] or "unknown"


def _whole(text: str) -> str:
    """The text without half characters, which no tokenizer can encode."""
    return text.encode("utf-8", "replace").decode()
