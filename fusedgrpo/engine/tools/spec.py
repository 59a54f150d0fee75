"""From what the user gave as tools and environments to what a process can load."""

from __future__ import annotations

import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedgrpo.engine.child_process import ChildProcess, GarbledReply, Requests
from fusedgrpo.engine.tools import describing
from fusedgrpo.engine.tools.describing import Description, EnvironmentDescription, describe
from fusedgrpo.engine.tools.loading import Loaded, Source, Sources, packed
from fusedgrpo.errors import ConfigError, brief
from fusedgrpo.named_code import locate_code
from fusedgrpo.search_path import library_first

LOADING_SECONDS = 600.0


class ToolSet:
    """The tools and environments of a run, found and described. Made by :func:`build_tools`.

    environments: their names; ``(None,)`` where there is one without a name, ``()`` for none.
    sources, path: what a process needs to load them, and its ``sys.path``. functions: the tools
    that are in this process too, those of environments from their classes; none of what was given
    by name.
    """

    def __init__(
        self,
        sources: Sources,
        path: Sequence[str],
        description: Description,
        functions: Sequence[Callable[..., Any]] = (),
    ):
        self.sources = sources
        self.functions = list(functions)
        self.path = list(path)
        self.environments: tuple[str | None, ...] = tuple(sources.environments)
        self._described = description

    def schemas(self, environment: str | None = None) -> list[dict[str, Any]]:
        """For ``tools`` of ``apply_chat_template``: those of the tools, then of the environment's.

        environment: one of ``environments``; None is the only one, or none. Raises KeyError.
        """
        own = self._environment(environment)
        return [*self._described.schemas, *(own.schemas if own else [])]

    def names(self, environment: str | None = None) -> list[str]:
        """Names of the tools, in the order of :meth:`schemas`."""
        return [schema["function"]["name"] for schema in self.schemas(environment)]

    @property
    def reward_names(self) -> tuple[str, ...]:
        """The environments' classes that reward: each its name, once."""
        classes = self._described.environments.values()
        return tuple(dict.fromkeys(each.class_name for each in classes if each.has_reward))

    def reward_name(self, environment: str | None = None) -> str | None:
        """The one of ``reward_names`` that an environment's reward is, None if it has no reward."""
        own = self._environment(environment)
        return own.class_name if own and own.has_reward else None

    def _environment(self, name: str | None) -> EnvironmentDescription | None:
        if name is None:
            return self._described.environments.get(None)
        return self._described.environments[name]


def build_tools(
    tools: Any,
    environment_factory: Any,
    folders: Sequence[Path],
    *,
    timeout: float | None = LOADING_SECONDS,
    check_interrupt: Callable[[], None] = lambda: None,
) -> ToolSet | None:
    """The tools and environments of a run, checked; None where there are neither.

    tools: a list of functions, async ones too, and of names ``file.py:function`` and
    ``module:function``. environment_factory: a class, a function that makes an environment, its
    name, or a dict of those by the names of environments. folders: where files and modules are
    looked for, from ``named_code.code_folders``. timeout: seconds for importing what has a name.
    check_interrupt: called meanwhile, and may raise.

    Raises :class:`ConfigError` with everything that cannot be used and what it lacks.
    """
    functions = list(tools) if isinstance(tools, (list, tuple)) else [tools]
    functions = [] if tools is None else functions
    factories = _factories(environment_factory)
    if not functions and not factories:
        return None
    sources = Sources(
        tuple(_source("tool", function, folders) for function in functions),
        {name: _source("environment", each, folders) for name, each in factories.items()},
    )
    path = _search_path(sources, folders)
    if _are_here(functions, factories):
        description = describe(Loaded(functions, factories))
    else:
        description = _described_elsewhere(sources, path, timeout, check_interrupt)
    tool_set = ToolSet(sources, path, description, _here(functions, factories))
    if problems := description.problems or _doubles(tool_set):
        raise ConfigError(dict.fromkeys(problems))
    return tool_set


def _factories(given: Any) -> dict[str | None, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        return {None: given}
    for name in given:
        if not isinstance(name, str):
            raise ConfigError(f"environment_factory: {name!r}: the name of an environment is text")
    return dict(given)


def _source(kind: str, given: Any, folders: Sequence[Path]) -> Source:
    if isinstance(given, str):
        code = locate_code(given, folders, kind, ConfigError)
        if code is None:
            raise ConfigError(
                f"{kind} {given!r}: expected 'file.py:name' or 'module:name', or the "
                f"{'function' if kind == 'tool' else 'class or function'} itself"
            )
        return Source(kind, given, named=code)
    if not callable(given):
        raise ConfigError(
            f"{kind} {brief(given)} ({type(given).__name__}): expected a "
            f"{'function' if kind == 'tool' else 'class or function'}, or its name "
            "'file.py:name' or 'module:name'"
        )
    text = getattr(given, "__name__", type(given).__name__)
    return Source(kind, text, pickled=packed(given, f"{kind} {text!r}"))


def _search_path(sources: Sources, folders: Sequence[Path]) -> list[str]:
    # What lies beside a file is nearer to it than what lies in the other folders.
    named = [s.named for s in (*sources.tools, *sources.environments.values()) if s.named]
    own = [os.path.dirname(code.target) for code in named if code.is_file]
    return library_first(sys.path, [*own, *map(str, folders)])


def _are_here(functions: list[Any], factories: dict[Any, Any]) -> bool:
    """Whether all can be described without running anything of the user's."""
    named = any(isinstance(each, str) for each in (*functions, *factories.values()))
    return not named and all(isinstance(factory, type) for factory in factories.values())


def _here(functions: list[Any], factories: dict[Any, Any]) -> list[Callable[..., Any]]:
    """The tools that are functions in this process."""
    kinds = [each for each in factories.values() if isinstance(each, type)]
    own = [getattr(kind, name) for kind in kinds for name in describing.methods(kind)]
    return list(dict.fromkeys([each for each in functions if callable(each)] + own))


def _doubles(tool_set: ToolSet) -> list[str]:
    problems = []
    for environment in tool_set.environments or (None,):
        names = tool_set.names(environment)
        where = "" if environment is None else f" (environment {environment!r})"
        problems += [
            f"tools: {names.count(name)} are called {name!r}{where}; rename one"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
    return problems


def _described_elsewhere(
    sources: Sources,
    path: Sequence[str],
    timeout: float | None,
    check_interrupt: Callable[[], None],
) -> Description:
    child = ChildProcess(describing.__name__, path)
    requests = Requests(child.connection, [Description, EnvironmentDescription])
    requests.send(pickle.dumps(sources))
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    try:
        child.wait(deadline, check_interrupt)
        answer = requests.receive()
    except TimeoutError:
        raise ConfigError(
            f"tools: importing them took more than {timeout:g} seconds, and the process was killed"
        ) from None
    except (EOFError, GarbledReply):
        raise ConfigError(
            f"tools: the process that imports them died: {child.how_it_died()}"
        ) from None
    finally:
        child.kill()
    assert answer is not None  # there was one request
    kind, content = answer
    if kind == "refused":
        raise ConfigError(content)
    assert isinstance(content, Description)
    return content
