"""Small conversations that show how a chat template writes calls and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.tools.types import ToolCall
from fusedgrpo.errors import reason

QUESTION = {"role": "user", "content": "?"}
_SEEN = "fused grpo"
_CALL = ToolCall("probe_tool", {"text": _SEEN, "count": 7})
SCHEMA = {
    "type": "function",
    "function": {
        "name": _CALL.name,
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "Text."},
                "count": {"type": "integer", "description": "Count."},
            },
            "required": ["text", "count"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class WrittenCall:
    """A call, and how a chat template writes it.

    before: the text up to it. text: the turn with the call.
    """

    call: ToolCall
    before: str
    text: str


def written_call(chat: ChatTemplate) -> WrittenCall | str:
    """How the template writes a call; where it writes none, why: what it does instead."""
    failed = "it leaves them out"
    for turn in calling_turns([_CALL]):
        try:
            begun = chat.text([QUESTION], schemas=[SCHEMA])
            text = chat.text([QUESTION, turn], generation_prompt=False, schemas=[SCHEMA])
        except Exception as error:  # noqa: BLE001 - templates are other people's code
            failed = reason(error)
            continue
        start = common_start(begun, text)
        if _CALL.name in text[start:] and _SEEN in text[start:]:
            return WrittenCall(_CALL, text[:start], text[start:])
    return failed


def calling_turns(calls: Sequence[ToolCall]) -> Iterator[dict[str, Any]]:
    """Turns of an assistant with these calls, as one template or another wants them: arguments as
    a mapping or as JSON, all calls or, where a turn has one at most, the first."""
    for arguments_of in (dict, json.dumps):
        for some in (calls, calls[:1]) if len(calls) > 1 else (calls,):
            functions = [
                {"name": call.name, "arguments": arguments_of(call.arguments)} for call in some
            ]
            written = [
                {"id": call_id(place), "type": "function", "function": function}
                for place, function in enumerate(functions)
            ]
            yield {"role": "assistant", "content": "", "tool_calls": written}


def call_id(place: int) -> str:
    """The id of a turn's call: nine letters and digits, as Mistral's templates want it."""
    return f"call{place:05d}"


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or tokens are the same, from the first on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
