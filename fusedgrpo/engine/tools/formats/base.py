"""A format of calls says where calls begin in a turn and reads them, and all share is here.

A format is strict about what it takes for a call, and says what is wrong with one that it cannot
read in words that help whoever wrote it: the policy gets to see them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fusedgrpo.engine.tools.types import ToolCall

# Calls, and where in the text they end.
Read = tuple[list[ToolCall], int]


class UnreadableCallError(ValueError):
    """A call that cannot be read; the message says why, to whoever wrote it."""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write calls.

    opening: matches where calls begin. read: from that match to the calls, and to where they end;
    raises UnreadableCallError. marks: what a tokenizer may have as special tokens, and what is
    needed of the text all the same. thoughts: from a text without calls to the reasoning in it and
    the rest, where that is not a matter of a pair of tags.
    """

    name: str
    opening: re.Pattern[str]
    read: Callable[[re.Match[str]], Read]
    marks: tuple[str, ...] = ()
    thoughts: Callable[[str], tuple[str, str]] | None = None


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no value in JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def past_space(text: str, start: int) -> int:
    """Where the white space at ``start`` ends."""
    while start < len(text) and text[start].isspace():
        start += 1
    return start


def read_json(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at ``start``, and where it ends. Raises UnreadableCallError."""
    try:
        return _DECODER.raw_decode(text, past_space(text, start))
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UnreadableCallError(f"the call is not valid JSON: {said}") from None


def call_of(value: Any) -> ToolCall:
    """The call that a JSON object says. Raises UnreadableCallError."""
    if not isinstance(value, dict):
        raise UnreadableCallError("the call is not a JSON object with a name and arguments")
    return checked_call(value.get("name"), value.get("arguments", value.get("parameters")))


def checked_call(name: Any, arguments: Any) -> ToolCall:
    """A call of these; no arguments are an empty mapping. Raises UnreadableCallError."""
    if not isinstance(name, str) or not name.strip():
        raise UnreadableCallError("the call has no name of a tool")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        kind = type(arguments).__name__
        raise UnreadableCallError(
            f"the arguments of {name.strip()!r} are {kind}, expected an object with their names"
        )
    return ToolCall(name.strip(), dict(arguments))


def closed(text: str, end: int, mark: str) -> int:
    """Where the mark that closes a call ends. A turn may end without it: nothing of the call is
    missing. Raises UnreadableCallError where anything else follows."""
    end = past_space(text, end)
    if end < len(text) and not text.startswith(mark, end):
        raise UnreadableCallError(
            f"expected {mark} behind the call, found {text[end : end + 20]!r}"
        )
    return min(end + len(mark), len(text))
