"""``structured_outputs``: what a completion has to match, by vLLM's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedgrpo.config.values import check_text
from fusedgrpo.errors import brief, did_you_mean

KINDS = ("regex", "json", "choice", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """The form that a completion has to match; all but one are None, as in vLLM's
    ``StructuredOutputsParams``. json: the text of a schema. choice: one of these texts. grammar:
    in Lark or GBNF."""

    regex: str | None = None
    json: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    @classmethod
    def of(cls, option: Mapping[str, Any] | None) -> StructuredOutputs | None:
        """From the option as ``read_structured`` leaves it."""
        if option is None:
            return None
        ((kind, value),) = option.items()
        if isinstance(value, Mapping):
            value = json.dumps(value)
        asked: dict[str, Any] = {kind: value if isinstance(value, str) else tuple(value)}
        return cls(**asked)

    @property
    def kind(self) -> str:
        """The one that is not None."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def read_structured(value: Any) -> Any:
    """The option with its value checked: the text of a schema is parsed, and what is no text of
    one stays, as the name of a file. ValueError says what was expected; what is no mapping is for
    the check of the type."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return value
    expected = f"expected one of {', '.join(KINDS)}"
    for name in value:
        if name not in KINDS:
            raise ValueError(f"{expected}, got {brief(name)}.{did_you_mean(name, KINDS)}")
    # Null is what vLLM's class has for those that were not given.
    given = {kind: asked for kind, asked in value.items() if asked is not None}
    if len(given) != 1:
        raise ValueError(f"{expected}, and one alone, got {', '.join(given) or 'none'}.")
    ((kind, asked),) = given.items()
    return {kind: _READ[kind](asked, kind)}


def _text(asked: Any, kind: str) -> str:
    if not isinstance(asked, str) or not asked:
        raise ValueError(f"{kind}: expected text, got {brief(asked)}.")
    return check_text(asked)


def _schema(asked: Any, kind: str) -> Any:
    if isinstance(asked, Mapping):
        return asked
    text = _text(asked, kind)
    return parsed_schema(text, kind) if text.lstrip().startswith("{") else text


def parsed_schema(text: str, where: str) -> dict[str, Any]:
    """The schema that ``text`` is. ValueError, which names ``where`` it was found."""
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise ValueError(f"{where}: expected a JSON schema, an object, got {brief(schema)}.")
    return schema


def _texts(asked: Any, kind: str) -> list[str]:
    if not isinstance(asked, (list, tuple)) or not asked:
        raise ValueError(f"{kind}: expected a list of texts, got {brief(asked)}.")
    return [_text(text, kind) for text in asked]


_READ = {"regex": _text, "json": _schema, "choice": _texts, "grammar": _text}
