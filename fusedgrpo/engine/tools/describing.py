"""Say what tools and environments are: names and schemas, or what they lack for them.

Done in a process of its own where their code is given by name, or an environment has to be made for
it: the trainer does not import and run other people's code unasked.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.engine.child_process import Answers, begin
from fusedgrpo.engine.tools.loading import Loaded, load
from fusedgrpo.errors import ToolError, brief, did_you_mean, reason

NOT_TOOLS = ("reset", "get_reward")
_HOW = (
    "A tool is a function with type hints and a docstring in Google's style: what it does, then "
    "'Args:' with a line 'name: what it is' for each argument"
)


@dataclass(slots=True)
class EnvironmentDescription:
    """class_name: of its instances. schemas: of its tools."""

    class_name: str
    schemas: list[dict[str, Any]]
    has_reward: bool


@dataclass(slots=True)
class Description:
    """schemas: of the tools without environment. problems: why some cannot be used."""

    schemas: list[dict[str, Any]] = field(default_factory=list)
    environments: dict[str | None, EnvironmentDescription] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def describe(loaded: Loaded) -> Description:
    """The tools and environments, with every problem at once.

    An environment that is no class is made to see what it is.
    """
    described = Description()
    for tool in loaded.tools:
        described.schemas += _schemas(tool, "", described.problems)
    for name, factory in loaded.environments.items():
        who = "the environment" if name is None else f"environment {name!r}"
        try:
            found = _environment(factory, who, described.problems)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - their constructor
            described.problems.append(f"{who}: making it failed with {reason(error)}")
        else:
            described.environments[name] = found
    return described


def methods(kind: type) -> list[str]:
    """The names of an environment's tools: public methods but for ``reset`` and ``get_reward``."""
    # On the class: properties of an instance would be evaluated.
    return [
        name
        for name, _ in inspect.getmembers(kind, inspect.isfunction)
        if not name.startswith("_") and name not in NOT_TOOLS
    ]


def _environment(
    factory: Callable[..., Any], who: str, problems: list[str]
) -> EnvironmentDescription:
    kind = factory if inspect.isclass(factory) else type(factory())
    who = f"{who} ({kind.__name__})"
    if not callable(getattr(kind, "reset", None)):
        near = did_you_mean("reset", [name for name in dir(kind) if not name.startswith("_")])
        problems.append(
            f"{who} has no method 'reset', which begins an episode: it is given the columns of "
            f"a data row and returns text for the prompt or None.{near}"
        )
    described = EnvironmentDescription(
        kind.__name__, [], callable(getattr(kind, "get_reward", None))
    )
    for name in methods(kind):
        described.schemas += _schemas(getattr(kind, name), f" of {who}", problems)
    return described


def _schemas(tool: Callable[..., Any], owner: str, problems: list[str]) -> list[dict[str, Any]]:
    """The schema of one tool; none where there is a problem, which is added."""
    from transformers.utils import get_json_schema

    name = getattr(tool, "__name__", "")
    if not name.isidentifier():
        problems.append(f"tool {brief(tool)}{owner} has no name: write it with def. {_HOW}")
        return []
    who = f"tool {name!r}{owner}"
    try:
        for parameter in inspect.signature(tool).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                problems.append(f"{who} takes {parameter}, for which no schema can be written")
                return []
            if parameter.kind is parameter.POSITIONAL_ONLY and parameter.name != "self":
                problems.append(f"{who} takes {parameter} by position, and calls are by name")
                return []
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # noqa: BLE001 - get_type_hints runs their code
        problems.append(f"{who}: {' '.join(str(error).split())}. {_HOW}")
        return []
    if "self" in schema["function"]["parameters"]["properties"]:  # annotated, so taken for one
        problems.append(
            f"{who}: its 'self' has a type hint, and is no argument. Leave the hint out"
        )
        return []
    return [schema]


def serve(fd: int, parent: int) -> None:
    """The process's end: describe the :class:`Sources` that come, once."""
    answers = Answers(begin(fd, parent, "tool-description"))
    try:
        answers.send("described", describe(load(pickle.loads(answers.receive()))))
    except EOFError:
        return
    except ToolError as error:
        answers.send("refused", str(error))
