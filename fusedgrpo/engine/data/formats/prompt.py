"""The format ``prompt``: TRL's convention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.data.formats.layout import Layout, Messages, Names, Prompt, text_of
from fusedgrpo.engine.data.rows import BadRowError, kind_of


@dataclass(frozen=True, slots=True)
class PromptLayout(Layout):
    """A ``prompt`` column, text or messages (TRL's convention)."""

    column: str = "prompt"

    @property
    def required(self) -> str:
        return self.column

    def read(self, row: Mapping[str, Any]) -> Prompt:
        value: Any = row.get(self.column)
        if isinstance(value, str):
            return Prompt(text_of(value, self.column), None)
        if getattr(value, "ndim", None) == 1:  # messages in an array, as pandas reads Parquet
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            messages = _messages(value, self.column)
            return Prompt(messages, messages)
        raise BadRowError(
            f"{self.column!r} is {kind_of(value)}, expected text or a list of messages"
        )

    def mapped(self, columns: Names, tags: Names) -> PromptLayout:
        return PromptLayout(columns.get("prompt") or self.column)


def _messages(value: Any, column: str) -> Messages:
    if not value:
        raise BadRowError(f"{column!r} is an empty list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRowError(f"{column!r}[{i}] is not a message with a role and content")
        content = message.get("content")
        if isinstance(content, (list, tuple)) and content:
            for part in content:
                text = part.get("text") if isinstance(part, Mapping) else None
                if not isinstance(text, str) or part.get("type") != "text":
                    kind = kind_of(part)
                    raise BadRowError(f"the content of {column!r}[{i}] has {kind}, expected text")
        elif not (isinstance(content, str) or _has_calls_alone(message)):
            kind = kind_of(content)
            raise BadRowError(f"the content of {column!r}[{i}] is {kind}, expected text")
    return [dict(message) | {"content": message.get("content") or ""} for message in value]


def _has_calls_alone(message: Mapping[str, Any]) -> bool:
    """Whether it is a turn of a history with calls of tools, and without content."""
    return message.get("content") is None and bool(message.get("tool_calls"))
