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
    """content: the text of the tool's message. failed: it is an error's."""

    name: str
    content: str
    failed: bool = False
