"""A layout says where the prompt is in a row, and everything that layouts share is here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.data.rows import BadRowError, Row, kind_of

Messages = list[dict[str, Any]]
Names = Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of a row.

    given: what the reward functions get. messages: what the chat template renders, or None where
    the text is taken verbatim. answer: the reference in the row, if its layout has one. schemas:
    of the tools that the prompt tells about. environment: the name of the row's, if it has one.
    is_in_row: the row has it, and no environment says it.
    """

    given: str | Messages
    messages: Messages | None
    answer: Any = None
    schemas: tuple[dict[str, Any], ...] = ()
    environment: str | None = None
    is_in_row: bool = True


class Layout(ABC):
    """Finds the prompt in the rows of a data set."""

    __slots__ = ()

    @property
    @abstractmethod
    def required(self) -> str:
        """The column that tells this layout, and without which no row has a prompt; empty where
        there is none."""

    @abstractmethod
    def read(self, row: Mapping[str, Any]) -> Prompt:
        """The prompt of a row. Raises BadRowError, whose message is the reason."""

    @abstractmethod
    def mapped(self, columns: Names, tags: Names) -> Layout:
        """The same layout under the names that LLaMA-Factory's ``columns`` and ``tags`` give.
        Raises DataError where it has no names to map."""

    def made(self, row: Row) -> Row:
        """The row that is used in place of a row of the source: as a rule, itself."""
        return row


def text_of(value: Any, column: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRowError(f"{column!r} is {kind_of(value)}, expected text")
    if not may_be_empty and not value.strip():
        raise BadRowError(f"{column!r} is empty")
    return value
