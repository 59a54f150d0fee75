"""A format of the user's: a function that makes rows with a prompt out of rows of any shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.engine.data.formats.layout import Layout, Names, Prompt
from fusedgrpo.engine.data.formats.prompt import PromptLayout
from fusedgrpo.engine.data.rows import Row, read_row
from fusedgrpo.errors import DataError, reason

_MADE = PromptLayout()


@dataclass(frozen=True, slots=True)
class FunctionLayout(Layout):
    """Calls ``function`` with each row; it returns the row that is used, or None for none.

    target, attribute: where the function is, in which alone two of these can differ. name: as the
    user gave it, for messages.
    """

    target: str
    attribute: str
    name: str = field(compare=False)
    function: Callable[[dict[str, Any]], Any] = field(compare=False)

    @property
    def required(self) -> str:
        return _MADE.required

    def read(self, row: Mapping[str, Any]) -> Prompt:
        return _MADE.read(row)

    def mapped(self, columns: Names, tags: Names) -> FunctionLayout:
        if any(columns.values()) or any(tags.values()):
            raise DataError(
                f"{self.name!r} is given the rows as they are; `columns` and `tags` are for the "
                "formats that are built in."
            )
        return self

    def made(self, row: Row) -> Row:
        """The row that the function makes of a row, checked like one of a file. A ValueError
        means a bad row; any other error is a DataError with the function and the row."""
        if row.values is None:
            return row
        try:
            values = self.function(dict(row.values))
        except ValueError as error:
            return Row(row.where, None, f"{self.name!r} raised {reason(error)}")
        except (Exception, SystemExit) as error:  # other people's code raises anything
            raise DataError(f"{row.where}: {self.name!r} failed with {reason(error)}") from error
        if values is None:
            return Row(row.where, None, f"{self.name!r} leaves it out", left_out=True)
        made = read_row(row.where, values)
        if made.values is None:
            return Row(row.where, None, f"what {self.name!r} returned {made.reason}")
        if self.required not in made.values:
            columns = ", ".join(map(repr, made.values)) or "nothing"
            problem = f"what {self.name!r} returned has no {self.required!r}, but {columns}"
            return Row(row.where, None, problem)
        return made
