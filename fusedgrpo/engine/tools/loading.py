"""Tools and factories of environments on their way into a process, and loaded there."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cloudpickle

from fusedgrpo.errors import ConfigError, ToolError, reason
from fusedgrpo.named_code import NamedCode, callable_of, load_module


@dataclass(frozen=True, slots=True)
class Source:
    """A callable of the user's. kind: ``"tool"`` or ``"environment"``. text: its name in messages.

    named: where it is imported from; None where ``pickled`` is the callable itself.
    """

    kind: str
    text: str
    named: NamedCode | None = None
    pickled: bytes = b""


@dataclass(frozen=True, slots=True)
class Sources:
    """All of a run: its tools, and by their names its environments (None: the only one)."""

    tools: tuple[Source, ...]
    environments: Mapping[str | None, Source]


@dataclass(frozen=True, slots=True)
class Loaded:
    """The callables of :class:`Sources`, in their order."""

    tools: list[Callable[..., Any]]
    environments: dict[str | None, Callable[..., Any]]


def packed(function: Callable[..., Any], who: str) -> bytes:
    """A callable for :func:`load`. Raises :class:`ConfigError` where it cannot be sent.

    Functions and classes that a clean process can import go by their names; those of a script, a
    notebook, a test or another function go whole, with the globals that they use.
    """
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    try:
        if module is None or module.__name__ == "__main__" or _is_importable(module):
            return cloudpickle.dumps(function)
        cloudpickle.register_pickle_by_value(module)
        try:
            return cloudpickle.dumps(function)
        finally:
            cloudpickle.unregister_pickle_by_value(module)
    except Exception as error:  # pickle raises what the values' own classes raise
        raise ConfigError(
            f"{who} runs in a process of its own, to which it cannot be sent ({reason(error)}). It "
            "refers to something that is in this process only, such as a lock, an open file or a "
            "connection: make that inside of it, or put the code in a file and give its name, "
            "'file.py:name'"
        ) from error


def _is_importable(module: ModuleType) -> bool:
    """Whether another process finds this very module by its name."""
    parts = module.__name__.split(".")
    path = spec = None
    for end in range(1, len(parts) + 1):
        # Not importlib.util.find_spec, which believes sys.modules.
        name = ".".join(parts[:end])
        found = (finder.find_spec(name, path) for finder in sys.meta_path)
        spec = next((each for each in found if each is not None), None)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    assert spec is not None  # a name has at least one part
    return spec.origin in ("built-in", "frozen", getattr(module, "__file__", None))


def load(sources: Sources) -> Loaded:
    """Import everything, each file and module once. Raises :class:`ToolError`."""
    modules: dict[tuple[bool, str], ModuleType] = {}

    def loaded(source: Source) -> Callable[..., Any]:
        if source.named is None:
            return _unpacked(source)
        key = (source.named.is_file, source.named.target)
        if key not in modules:
            modules[key] = load_module(source.named, source.kind, ToolError)
        return callable_of(modules[key], source.named, source.kind, ToolError)

    return Loaded(
        [loaded(source) for source in sources.tools],
        {name: loaded(source) for name, source in sources.environments.items()},
    )


def _unpacked(source: Source) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = pickle.loads(source.pickled)
        return function
    except (Exception, SystemExit) as error:  # what it refers to is imported, and raises anything
        raise ToolError(
            f"{source.kind} {source.text!r} cannot be rebuilt in a process of its own: "
            f"{reason(error)}. Put it in a file and give its name, 'file.py:name'"
        ) from error
