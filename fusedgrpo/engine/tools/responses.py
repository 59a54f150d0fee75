"""Turns as the tokenizer's own description of them says: ``response_template``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fusedgrpo.engine.tools.formats import UnreadableCallError, checked_call
from fusedgrpo.engine.tools.types import ToolCall
from fusedgrpo.errors import reason

Written = str | list[int]
# From a turn and what is before it to a message and its calls.
Responses = Callable[[Written, Written], tuple[dict[str, Any], list[ToolCall]]]


def response_reader(tokenizer: Any) -> Responses | None:
    """A function that reads turns so; None for a tokenizer that does not describe them.

    It raises UnreadableCallError where a turn cannot be read.
    """
    parse = getattr(tokenizer, "parse_response", None)
    known = inspect.signature(parse).parameters if parse else {}
    # Before transformers 5.13 it was response_schema, and there was no prefix.
    name = "response_template" if "prefix" in known else "response_schema"
    if parse is None or getattr(tokenizer, name, None) is None:
        return None

    def read(turn: Written, before: Written) -> tuple[dict[str, Any], list[ToolCall]]:
        options: dict[str, Any] = {"prefix": before} if "prefix" in known else {}
        try:
            found = parse(turn or "", **options)  # an empty list is no turn, but a batch of none
        except Exception as error:
            raise UnreadableCallError(f"the turn cannot be read: {reason(error)}") from error
        if not isinstance(found, Mapping):
            raise UnreadableCallError("the turn cannot be read")
        content = found.get("content") or ""
        if isinstance(content, str) and tokenizer.eos_token:
            content = content.removesuffix(tokenizer.eos_token)
        message = {**found, "role": "assistant", "content": content}
        return message, _calls(message.pop("tool_calls", None) or [])

    return read


def _calls(listed: Any) -> list[ToolCall]:
    calls = []
    for one in listed if isinstance(listed, list) else [listed]:
        function = one.get("function", one) if isinstance(one, Mapping) else None
        if not isinstance(function, Mapping):
            raise UnreadableCallError("the call is not a JSON object with a name and arguments")
        calls.append(checked_call(function.get("name"), function.get("arguments")))
    return calls
