"""Every option in words, and as a JSON schema: for the command line, the documentation and editors.

All of it is read from the fields of :class:`~fusedgrpo.config.schema.GRPOConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.schema import GRPOConfig, type_of
from fusedgrpo.config.values import group_of, kind_of, limits_of, members_of

# Values of other types that are read as well: see config/reading.py.
_MORE_TYPES = {"scale_rewards": ["boolean"], "resume_from_checkpoint": ["boolean"]}
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object"}
_JSON_LIMITS = {
    ">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum",
}  # fmt: skip


@dataclass(frozen=True)
class OptionFacts:
    """kind: the values it takes, in words. default: as YAML writes it. aliases: names of other
    trainers that are read as this one. help: a sentence."""

    name: str
    group: str
    kind: str
    default: str
    aliases: tuple[str, ...]
    help: str


def described_options() -> list[OptionFacts]:
    """All options in the order in which they are defined, which keeps groups together."""
    return [
        OptionFacts(
            name=spec.name,
            group=group_of(spec),
            kind=kind_of(type_of(spec.name), limits_of(spec)),
            default=_yaml(spec.default),
            aliases=tuple(sorted(k for k, alias in ALIASES.items() if alias.option == spec.name)),
            help=_sentence(spec.metadata["help"]),
        )
        for spec in fields(GRPOConfig())
    ]


def by_group(options: Iterable[OptionFacts]) -> dict[str, list[OptionFacts]]:
    """Options under their headings."""
    found: dict[str, list[OptionFacts]] = {}
    for option in options:
        found.setdefault(option.group, []).append(option)
    return found


def options_page() -> str:
    """``docs/options.md``."""
    lines = [
        "# Options",
        "",
        "Every option of `GRPOConfig`, of a configuration file, and of `fusedgrpo train` (`--name "
        "value`), with the names that other trainers have for it. `fusedgrpo options NAME` shows "
        "one of them, `config.schema.json` is the same for editors. Written by `make options` "
        "from `fusedgrpo/config/schema.py`; do not edit.",
    ]
    for heading, options in by_group(described_options()).items():
        lines += ["", f"## {heading.capitalize()}", ""]
        lines += ["| option | default | takes | |", "|---|---|---|---|"]
        for option in options:
            text = option.help
            if option.aliases:
                text += f" Also read as {', '.join(f'`{name}`' for name in option.aliases)}."
            cells = (f"`{option.name}`", f"`{option.default}`", option.kind, text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def json_schema() -> str:
    """A JSON schema of configuration files, which editors check and complete YAML with."""
    properties: dict[str, Any] = {}
    converted: dict[str, Any] = {}
    for spec, option in zip(fields(GRPOConfig()), described_options(), strict=True):
        entry = {"description": f"{option.help} Default: {option.default}."} | _json_type(
            spec.name, type_of(spec.name), limits_of(spec)
        )
        properties[spec.name] = entry
        for name in option.aliases:
            # The values of a converted name are its own.
            same = entry if ALIASES[name].convert is None else {}
            text = f"Read as {spec.name}. {entry['description']}"
            converted[name] = same | {"description": text}
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "fusedgrpo: options of a run",
        "type": "object",
        "additionalProperties": False,
        "properties": properties | converted,
    }
    return json.dumps(schema, indent=1) + "\n"


def _json_type(name: str, hint: Any, limits: Any) -> dict[str, Any]:
    if hint is Any:
        return {"type": ["string", "array", "null"], "items": {"type": "string"}}
    types: list[str] = list(_MORE_TYPES.get(name, []))
    choices: list[Any] = []
    for member in members_of(hint):
        origin = get_origin(member) or member
        if origin is Literal:
            choices += get_args(member)
        elif origin in (list, tuple):
            types += ["array", "string"]  # or the items with commas between them
        else:
            types.append("null" if member is NoneType else _JSON_TYPES[origin])
    if choices:
        other: dict[str, list[Any]] = {"null": [None], "boolean": [True, False]}
        return {"enum": [*choices, *(value for kind in types for value in other[kind])]}
    bounds = {_JSON_LIMITS[sign]: bound for sign, bound in limits.items()}
    return {"type": types[0] if len(types) == 1 else list(dict.fromkeys(types))} | bounds


def _yaml(value: Any) -> str:
    """A default as a configuration file has it."""
    value = list(value) if isinstance(value, tuple) else value
    return value if isinstance(value, str) else json.dumps(value)


def _sentence(text: str) -> str:
    """The help of an option, with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."
