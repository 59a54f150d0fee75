"""A call of a tool, and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """name: of the tool. arguments: by their names, as the policy gave them."""

    name: str
    arguments: Any


@dataclass(frozen=True, slots=True)
class ToolResult:
    """content: the text of the tool's message. failed: it is an error's. value: the list that the
    tool returned, which is the content for reward functions (TRL's convention), if it was one."""

    name: str
    content: str
    failed: bool = False
    value: list[Any] | None = None
