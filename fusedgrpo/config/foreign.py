"""Options that TRL, transformers, LLaMA-Factory or verl have and this trainer has not.

Such an option is never ignored: it is refused by name with a remedy, unless its value asks for
what happens here anyway (mostly the other trainer's own default). ``foreign_options.toml`` lists
them and says how it is read.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, NamedTuple


class Refused(NamedTuple):
    """An option that does not exist here. ``harmless`` values of it change nothing; if it is
    ``inert``, no value does."""

    remedy: str
    harmless: tuple[Any, ...] = ()
    inert: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether the value asks for nothing (types count: 1 is not true)."""
        return (
            self.inert
            or value is None
            or any(type(value) is type(v) and value == v for v in self.harmless)
        )


def read_options(text: str) -> dict[str, Refused]:
    """The options of a TOML file. ValueError if one is named twice."""
    options: dict[str, Refused] = {}
    for group in tomllib.loads(text).values():
        named = [(name, "null") for name in group.get("unset", ())]
        inert = group.get("inert", ())
        named += [(name, "null") for name in inert]
        for name, value in named + list(group.get("harmless", {}).items()):
            if name in options:
                raise ValueError(f"{name} is named twice.")
            values = value if isinstance(value, list) else [value]
            harmless = tuple(None if item == "null" else item for item in values)
            options[name] = Refused(group["remedy"], harmless, name in inert)
    return options


REFUSED = read_options(Path(__file__).with_name("foreign_options.toml").read_text("utf-8"))
