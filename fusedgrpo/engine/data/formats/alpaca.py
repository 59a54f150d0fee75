"""The format ``alpaca``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.data.formats.layout import Layout, Messages, Names, Prompt, text_of
from fusedgrpo.engine.data.rows import BadRowError, kind_of


@dataclass(frozen=True, slots=True)
class AlpacaLayout(Layout):
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
        parts = [text_of(row.get(self.prompt), self.prompt, may_be_empty=bool(self.query))]
        query = row.get(self.query) if self.query else None
        if query is not None:
            parts.append(text_of(query, str(self.query), may_be_empty=True))
        text = text_of("\n".join(part for part in parts if part.strip()), self.prompt)
        messages: Messages = []
        system = row.get(self.system) if self.system else None
        if system:
            messages.append({"role": "system", "content": text_of(system, str(self.system))})
        history = (row.get(self.history) if self.history else None) or []
        if not isinstance(history, (list, tuple)):
            raise BadRowError(f"{self.history!r} is {kind_of(history)}, expected a list of pairs")
        for turn in history:
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise BadRowError(f"{self.history!r} must hold [question, answer] pairs")
            for role, content in zip(("user", "assistant"), turn, strict=True):
                messages.append({"role": role, "content": text_of(content, str(self.history))})
        messages.append({"role": "user", "content": text})
        return Prompt(text, messages, row.get(self.response) if self.response else None)

    def mapped(self, columns: Names, tags: Names) -> AlpacaLayout:
        if not columns:
            return self
        # As in LLaMA-Factory: where `columns` is given, what it does not name is not used.
        names = {key: columns.get(key) for key in ("query", "response", "system", "history")}
        return AlpacaLayout(columns.get("prompt") or self.prompt, **names)
