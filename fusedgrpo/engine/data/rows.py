"""One row of a data set, however it was read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusedgrpo.errors import brief, reason

# Values in values of a row. What is nested deeper cannot be copied, compared or sent to a worker.
DEEPEST = 100


class BadRowError(ValueError):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source. ``values`` is None where there are none to use, for ``reason``.

    left_out: it was meant not to be used, and is no bad row.
    """

    where: str
    values: dict[str, Any] | None
    reason: str = ""
    left_out: bool = False


def read_row(where: str, values: Any) -> Row:
    """A row, with the reason in place of values that cannot be the columns of one."""
    if isinstance(values, Mapping):
        if is_deep(values):
            return Row(where, None, f"is nested more than {DEEPEST} levels deep, or holds itself")
        for name in values:
            if not isinstance(name, str):
                kind = kind_of(name)
                return Row(where, None, f"has a column named {kind}, expected text as the name")
        return Row(where, dict(values))
    return Row(where, None, f"is {kind_of(values)}, expected an object with named columns")


def is_deep(values: Any) -> bool:
    """Whether values are nested deeper than ``DEEPEST``, or hold themselves."""
    level = [values]
    for _ in range(DEEPEST):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(item, (Mapping, list, tuple))
        ]
        if not level:
            return False
    return True


def each_row(
    name: str, count: int, together: Callable[[], Iterable[Any]], alone: Callable[[int], Any]
) -> Iterator[Row]:
    """Rows that a library reads, ``together`` as far as it comes, from there one by one: values
    that Python has not, a damaged file, cost the rows that have them."""
    done = 0
    with contextlib.suppress(Exception):  # it comes again below, with the row it is about
        for values in together():
            yield read_row(f"{name} row {done}", values)
            done += 1
    for i in range(done, count):
        try:
            yield read_row(f"{name} row {i}", alone(i))
        except Exception as error:  # noqa: BLE001 - as many kinds as libraries
            yield Row(f"{name} row {i}", None, f"cannot be read: {reason(error)}")


def kind_of(value: Any) -> str:
    """The type of a value and the beginning of it, for messages."""
    if value is None:
        return "null"
    text = value if isinstance(value, str) else brief(value)
    return f"{type(value).__name__} {text[:40]!r}"


def check_characters(value: Any) -> None:
    """Raise BadRowError for half a character in any text: no tokenizer can encode it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRowError(
                f"it has half a character, {value[error.start]!r} (a lone surrogate), at position "
                f"{error.start} of {value[:40]!r}"
            ) from None
    elif isinstance(value, dict):
        for item in value.values():
            check_characters(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_characters(item)
