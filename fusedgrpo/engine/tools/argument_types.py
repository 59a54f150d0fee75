"""Arguments that a policy wrote as text, in the types that the tool's schema has."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fusedgrpo.engine.tools.types import ToolCall

Schemas = Sequence[Mapping[str, Any]]  # as ``apply_chat_template`` takes them

_WORDS = {"True": True, "False": False, "None": None}


def typed(call: ToolCall, schemas: Schemas) -> ToolCall:
    """The call, with text that is a value of the parameter's type read as such.

    Text stays text where the parameter may be text, where it is no such value, and where nothing
    is known of the parameter: the tool says what is wrong with it.
    """
    parameters = _parameters(call.name, schemas)
    arguments = {
        name: _typed(value, parameters.get(name)) if isinstance(value, str) else value
        for name, value in call.arguments.items()
    }
    return ToolCall(call.name, arguments)


def _parameters(name: str, schemas: Schemas) -> Mapping[str, Any]:
    for schema in schemas:
        function = schema.get("function", schema)
        if function.get("name") == name:
            return (function.get("parameters") or {}).get("properties") or {}
    return {}


def _typed(text: str, schema: Any) -> Any:
    kinds = _kinds(schema)
    try:
        value: Any = _WORDS[text.strip()] if text.strip() in _WORDS else json.loads(text)
    except (ValueError, RecursionError):
        return text
    kind = _kind(value)
    if kind == "number" and "integer" in kinds and "number" not in kinds and value.is_integer():
        value, kind = int(value), "integer"
    if kind == "integer" and "number" in kinds:
        kind = "number"
    if isinstance(value, float) and not math.isfinite(value):
        return text
    if kind not in kinds or ("string" in kinds and value is not None):
        return text
    return value


def _kinds(schema: Any) -> set[str]:
    """The JSON types that a schema names; none where it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    kinds = {named} if isinstance(named, str) else {k for k in named or () if isinstance(k, str)}
    for union in ("anyOf", "oneOf"):
        for choice in schema.get(union) or ():
            kinds |= _kinds(choice)
    return kinds | ({"null"} if schema.get("nullable") else set())


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object")
