"""Which of the run's tools the prompt of a row has: its columns ``tools`` and ``environment``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from fusedgrpo.engine.data.formats import Prompt
from fusedgrpo.engine.data.rows import BadRowError, kind_of
from fusedgrpo.errors import DataError, brief, did_you_mean

Schema = dict[str, Any]


class Tools(Protocol):
    """The tools of a run.

    environments: their names; ``(None,)`` for one without a name, ``()`` for none. schemas: JSON
    schemas, as ``apply_chat_template`` takes them, of all that a row of an environment may call.
    """

    environments: tuple[str | None, ...]

    def schemas(self, environment: str | None = None) -> list[Schema]: ...


class RowTools:
    """Gives prompts their tools. tools: the run's, None for a run without any."""

    def __init__(self, tools: Tools | None):
        self.tools = tools
        names = [] if tools is None else [name for name in tools.environments if name is not None]
        self._environments = names
        self._schemas = {name: self._by_name(name) for name in names or (None,)}

    @property
    def schemas(self) -> list[list[Schema]]:
        """The schemas of each environment, on which prompts depend."""
        return [list(schemas.values()) for schemas in self._schemas.values()]

    def given(self, prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
        """The prompt with the tools of its row: all, or those that the column ``tools`` names.

        Raises BadRowError for names that there are not, and DataError for a column of tools in a
        run that has none.
        """
        environment = self._environment(row)
        schemas = self._schemas[environment]
        names = _names(row.get("tools"))
        if names and self.tools is None:
            raise DataError(
                f"the column 'tools' names {brief(names)}, and the run has no tools: prompts would "
                "offer what nobody answers. Set tools (or pass tools=) to functions of these "
                "names, or remove or rename the column."
            )
        for name in names or ():
            if name not in schemas:
                where = "" if environment is None else f" and its environment {environment!r}"
                raise BadRowError(
                    f"'tools' names {brief(name)}, which is none of the tools of the run{where}: "
                    f"{', '.join(schemas) or 'none'}.{did_you_mean(name, schemas)}"
                )
        chosen = schemas if names is None else {name: schemas[name] for name in names}
        return replace(prompt, schemas=tuple(chosen.values()), environment=environment)

    def _environment(self, row: Mapping[str, Any]) -> str | None:
        """The row's environment, where environments have names; else the column is like others."""
        if not self._environments:
            return None
        name = row.get("environment")
        if not isinstance(name, str) or name not in self._environments:
            hint = did_you_mean(name, self._environments) if isinstance(name, str) else ""
            raise BadRowError(
                f"'environment' is {kind_of(name)}, expected one of the environments of the run: "
                f"{', '.join(self._environments)}.{hint}"
            )
        return name

    def _by_name(self, environment: str | None) -> dict[str, Schema]:
        schemas = [] if self.tools is None else self.tools.schemas(environment)
        return {str(_name(schema)): schema for schema in schemas}


def _names(value: Any) -> list[str] | None:
    """The tools that a row names, by names or schemas, or by JSON of them; None for all."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRowError(f"'tools' is no JSON: {error}") from None
    if value is None or isinstance(value, str):
        return None
    if getattr(value, "ndim", None) == 1:  # in an array, as pandas reads Parquet
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise BadRowError(f"'tools' is {kind_of(value)}, expected a list of names or schemas")
    names = [_name(item) for item in value]
    for name, item in zip(names, value, strict=True):
        if not isinstance(name, str):
            raise BadRowError(f"'tools' has {kind_of(item)}, expected a name or a schema")
    return names


def _name(item: Any) -> Any:
    """The name of a tool in its schema, with or without OpenAI's wrapping; of a name, itself."""
    if not isinstance(item, Mapping):
        return item
    function = item.get("function")
    return (function if isinstance(function, Mapping) else item).get("name")
