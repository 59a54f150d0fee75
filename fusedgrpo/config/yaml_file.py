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

from fusedgrpo.errors import ConfigError, brief, reason
from fusedgrpo.input_files import read_text

# Far above what a configuration needs, far below what nested aliases expand to.
_MOST_MERGED = 100


class _Loader(yaml.SafeLoader):
    """SafeLoader with duplicate keys refused, numbers as everybody writes them, and every fault of
    a value a YAMLError with its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except (
            Exception
        ) as error:  # PyYAML's constructors raise KeyError, IndexError, TypeError ...
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{brief(node.value)} is no {node.tag}: {reason(error)}",
                node.start_mark,
            ) from error

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if any("\ud800" <= c <= "\udfff" for c in text):
            # JSON writes characters beyond U+FFFF as pairs of escapes, which YAML leaves apart.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
        return text

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge" and len(value.value) > _MOST_MERGED:
                raise yaml.constructor.ConstructorError(
                    None, None, f"more than {_MOST_MERGED} mappings are merged", key.start_mark
                )
        super().flatten_mapping(node)
        if len(node.value) > 100 * _MOST_MERGED:
            raise yaml.constructor.ConstructorError(
                None, None, "merging makes the mapping too large", node.start_mark
            )

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
                    None, None, f"key {brief(key)} is given twice", key_node.start_mark
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
# Only the types that JSON has: a set has no order, and no option takes a date.
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None
    or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+0123456789.")
)


def read_config_file(path: str | Path) -> dict[Any, Any]:
    """The mapping in a YAML or JSON file. ConfigError names the file and, if known, the line."""
    path = Path(path)
    text = read_text(path, ConfigError)
    try:
        # JSON is YAML but for tabs, which YAML forbids where JSON has them as indentation.
        if path.suffix == ".json":
            text = re.sub(r"^\t+", lambda tabs: " " * len(tabs.group()), text, flags=re.MULTILINE)
        options = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {_describe(error)}") from error
    except RecursionError:
        raise ConfigError(f"{path}: its values are nested too deeply.") from None
    if not isinstance(options, dict):
        found = "nothing" if options is None else type(options).__name__
        raise ConfigError(f"{path}: expected `option: value` lines, found {found}.")
    return options


def parse_override(text: str, takes_text: bool) -> Any:
    """A value typed on a command line. Options that take text get it as it is."""
    if takes_text and text not in ("null", "~") and not text.startswith(("[", "{")):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        return text  # no YAML: the type check of the option says what it expects


def _describe(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    problem = getattr(error, "problem", None) or reason(error)
    if "could not determine a constructor for the tag" in problem:
        problem = f"{problem[:300]}; only plain values are accepted, no Python objects"
    return f"{line}{problem}."
