"""Where the prompt is in a row of a data set.

A ``prompt`` column with text or messages (TRL), Alpaca (``instruction``, ``input``, ``output``),
or a conversation (ShareGPT or OpenAI messages). Column names can be mapped, as LLaMA-Factory's
``dataset_info.json`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.errors import DataError, brief, did_you_mean

Messages = list[dict[str, Any]]


class BadRowError(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of a row.

    given: what the reward functions get. messages: what the chat template renders, or None where
    the text is taken verbatim. answer: the reference in the row, if its layout has one.
    """

    given: str | Messages
    messages: Messages | None
    answer: Any = None


@dataclass(frozen=True, slots=True)
class PromptLayout:
    """A ``prompt`` column, text or messages (TRL's convention)."""

    column: str = "prompt"

    @property
    def required(self) -> str:
        return self.column

    def read(self, row: Mapping[str, Any]) -> Prompt:
        value: Any = row.get(self.column)
        if isinstance(value, str):
            return Prompt(_text(value, self.column), None)
        if getattr(value, "ndim", None) == 1:  # messages in an array, as pandas reads Parquet
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            messages = _messages(value, self.column)
            return Prompt(messages, messages)
        raise BadRowError(
            f"{self.column!r} is {kind_of(value)}, expected text or a list of messages"
        )


@dataclass(frozen=True, slots=True)
class AlpacaLayout:
    """``instruction``, ``input``, ``output``, ``system``, ``history`` under any column names."""

    prompt: str = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    system: str | None = "system"
    history: str | None = "history"

    @property
    def required(self) -> str:
        return self.prompt

    def read(self, row: Mapping[str, Any]) -> Prompt:
        parts = [_text(row.get(self.prompt), self.prompt, may_be_empty=bool(self.query))]
        query = row.get(self.query) if self.query else None
        if query is not None:
            parts.append(_text(query, str(self.query), may_be_empty=True))
        text = _text("\n".join(part for part in parts if part.strip()), self.prompt)
        messages: Messages = []
        system = row.get(self.system) if self.system else None
        if system:
            messages.append({"role": "system", "content": _text(system, str(self.system))})
        history = (row.get(self.history) if self.history else None) or []
        if not isinstance(history, (list, tuple)):
            raise BadRowError(f"{self.history!r} is {kind_of(history)}, expected a list of pairs")
        for turn in history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise BadRowError(f"{self.history!r} must hold [question, answer] pairs")
            for role, content in zip(("user", "assistant"), turn, strict=True):
                messages.append({"role": role, "content": _text(content, str(self.history))})
        messages.append({"role": "user", "content": text})
        return Prompt(text, messages, row.get(self.response) if self.response else None)


@dataclass(frozen=True, slots=True)
class ConversationLayout:
    """A list of turns; the last assistant turn is the answer, what precedes it the prompt."""

    column: str = "conversations"
    system: str | None = None
    role_tag: str = "from"
    content_tag: str = "value"
    roles: dict[str, str] = field(default_factory=lambda: {"human": "user", "gpt": "assistant"})

    @property
    def required(self) -> str:
        return self.column

    def read(self, row: Mapping[str, Any]) -> Prompt:
        turns = row.get(self.column)
        if not isinstance(turns, (list, tuple)) or not turns:
            raise BadRowError(f"{self.column!r} is {kind_of(turns)}, expected a list of turns")
        messages: Messages = []
        for turn in turns:
            role = turn.get(self.role_tag) if isinstance(turn, Mapping) else None
            if not isinstance(role, str) or role not in self.roles:
                known = ", ".join(self.roles)
                raise BadRowError(f"{self.column!r} has the role {brief(role)}, expected {known}")
            content = _text(turn.get(self.content_tag), self.content_tag)
            messages.append({"role": self.roles[role], "content": content})
        system = row.get(self.system) if self.system else None
        if system:
            messages.insert(0, {"role": "system", "content": _text(system, str(self.system))})
        answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if not messages or messages[-1]["role"] != "user":
            raise BadRowError(f"{self.column!r} has no user turn to answer at its end")
        return Prompt(messages, messages, answer)


Layout = PromptLayout | AlpacaLayout | ConversationLayout


def guess_layout(columns: list[str], source: str) -> Layout:
    """The layout that the column names tell. DataError shows the columns if none fits."""
    if "prompt" in columns:
        return PromptLayout()
    if "instruction" in columns:
        return AlpacaLayout()
    raise missing_column("prompt", columns, source, " (or `instruction`, as in Alpaca data)")


def missing_column(column: str, columns: list[str], source: str, or_else: str = "") -> DataError:
    """The error for a prompt column that is not there."""
    return DataError(
        f"{source}: no column {column!r}{or_else}; the columns are "
        f"{', '.join(map(repr, columns)) or 'none'}.{did_you_mean(column, columns)} Rename one, or "
        "map it under `columns` in dataset_info.json."
    )


def _text(value: Any, column: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {kind_of(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise BadRowError(f"{column!r} is empty")
    return value


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
        elif not isinstance(content, str):
            kind = kind_of(content)
            raise BadRowError(f"the content of {column!r}[{i}] is {kind}, expected text")
    return [dict(message) for message in value]


def kind_of(value: Any) -> str:
    if value is None:
        return "null"
    text = value if isinstance(value, str) else brief(value)
    return f"{type(value).__name__} {text[:40]!r}"
