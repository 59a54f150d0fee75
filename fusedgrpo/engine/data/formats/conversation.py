"""The formats ``sharegpt`` and ``openai``: conversations under different names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.engine.data.formats.layout import Layout, Messages, Names, Prompt, text_of
from fusedgrpo.engine.data.rows import BadRowError, kind_of
from fusedgrpo.errors import brief


@dataclass(frozen=True, slots=True)
class ConversationLayout(Layout):
    """A list of turns; the last assistant turn is the answer, what precedes it the prompt.

    roles: the values of ``role_tag``, and what they are to the chat template.
    """

    column: str = "conversations"
    system: str | None = None
    role_tag: str = "from"
    content_tag: str = "value"
    roles: dict[str, str] = field(
        default_factory=lambda: {"system": "system", "human": "user", "gpt": "assistant"}
    )

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
            content = text_of(turn.get(self.content_tag), self.content_tag)
            messages.append({"role": self.roles[role], "content": content})
        system = row.get(self.system) if self.system else None
        if system:
            messages.insert(0, {"role": "system", "content": text_of(system, str(self.system))})
        answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
        if not messages or messages[-1]["role"] != "user":
            raise BadRowError(f"{self.column!r} has no user turn to answer at its end")
        return Prompt(messages, messages, answer)

    def mapped(self, columns: Names, tags: Names) -> ConversationLayout:
        return ConversationLayout(
            column=columns.get("messages") or self.column,
            system=columns.get("system"),
            role_tag=tags.get("role_tag") or self.role_tag,
            content_tag=tags.get("content_tag") or self.content_tag,
            roles={tags.get(f"{role}_tag") or tag: role for tag, role in self.roles.items()},
        )


SHAREGPT = ConversationLayout()
OPENAI = ConversationLayout(
    "messages",
    role_tag="role",
    content_tag="content",
    roles={role: role for role in ("system", "user", "assistant")},
)
