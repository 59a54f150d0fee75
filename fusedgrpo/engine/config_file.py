"""Read a configuration file: YAML or JSON, with the traps of YAML 1.1 closed.

Duplicate keys are refused instead of the last one winning, ``1e-5`` is a number, dates stay text,
and only plain data is accepted (no Python tags).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from fusedgrpo.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with duplicate keys refused and numbers as everybody writes them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # SafeLoader reports it
            if key in first:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            first[key] = key_node
        return super().construct_mapping(node, deep)


_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.[0-9_]*|\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+0123456789.")
)


def read_config_file(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML or JSON file. ConfigError names the file and, if known, the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}.") from error
    try:
        # JSON is YAML but for tabs, which YAML forbids where JSON has them as indentation.
        if path.suffix == ".json":
            text = re.sub(r"^\t+", lambda tabs: " " * len(tabs.group()), text, flags=re.MULTILINE)
        options = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from error
    if not isinstance(options, dict):
        found = "nothing" if options is None else type(options).__name__
        raise ConfigError(f"{path}: expected `option: value` lines, found {found}.")
    return options


def parse_override(text: str, *, takes_text: bool) -> Any:
    """A value typed on a command line. Options that take text get it as it is."""
    if takes_text and text not in ("null", "~") and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text  # no YAML: the type check of the option says what it expects


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or str(error)
    if "could not determine a constructor for the tag" in problem:
        problem += "; only plain values are accepted, no Python objects"
    return f"{line}{problem}."
