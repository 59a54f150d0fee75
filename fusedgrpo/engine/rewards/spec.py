"""From a name in ``reward_funcs`` to a function.

Looked up in this order: a built-in name, ``file.py:function``, ``module:function``, a reward
model's directory, its Hub id (has a ``/``), dotted ``module.function``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from fusedgrpo.engine.rewards.builtin import FACTORIES, FUNCTIONS
from fusedgrpo.engine.rewards.call import RewardCall
from fusedgrpo.errors import RewardError, did_you_mean


@dataclass(frozen=True, slots=True)
class Source:
    """Where a named reward comes from. ``text`` is the name as the user gave it.

    target: built-in name, absolute path of the file, module, or directory or id of a model.
    """

    kind: Literal["builtin", "file", "module", "model"]
    text: str
    target: str
    attribute: str = ""


def locate(text: str, folders: Sequence[Path]) -> Source:
    """Find out what ``text`` names, without importing anything.

    folders: where relative files and directories are looked for, in this order.
    Raises :class:`RewardError` if it can be nothing.
    """
    if text in FUNCTIONS or text in FACTORIES:
        return Source("builtin", text, text)
    target, colon, attribute = text.rpartition(":")
    if colon and target.endswith(".py"):
        return Source("file", text, str(_existing(text, target, folders)), attribute)
    if colon:
        return Source("module", text, target, attribute)
    if text.endswith(".py"):
        raise RewardError(f"reward_funcs: name a function of {text!r}, as in {text + ':reward'!r}")
    for folder in folders:
        directory = folder / Path(text).expanduser()
        if directory.is_dir():
            return Source("model", text, str(directory))
    if "/" in text:
        return Source("model", text, text)
    module, dot, attribute = text.rpartition(".")
    if dot:
        return Source("module", text, module, attribute)
    names = [*FUNCTIONS, *FACTORIES]
    raise RewardError(
        f"reward_funcs: no reward function {text!r}.{did_you_mean(text, names)} Built in: "
        f"{', '.join(names)}. Your own: 'file.py:function' or 'module:function'; a reward "
        "model: its directory or Hub id."
    )


def _existing(text: str, target: str, folders: Sequence[Path]) -> Path:
    paths = [(folder / Path(target).expanduser()).resolve() for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    looked = ", ".join(map(str, dict.fromkeys(paths)))
    raise RewardError(f"reward function {text!r}: no such file (looked for {looked})")


def load(source: Source, kwargs: Mapping[str, Any]) -> RewardCall:
    """Import the function behind ``source``, a built-in one or the user's.

    kwargs: what ``reward_kwargs`` says for it: the arguments of a factory or of a class,
    constant arguments of any other function. Raises :class:`RewardError`.
    """
    function: Callable[..., Any]
    if source.kind == "builtin":
        if source.text in FUNCTIONS:
            return RewardCall(FUNCTIONS[source.text], kwargs)
        function = FACTORIES[source.text]
    else:
        function = _attribute(source, _module(source))
    if source.kind == "builtin" or inspect.isclass(function):
        return RewardCall(_made(source, function, kwargs))
    return RewardCall(function, kwargs)


def _made(source: Source, factory: Callable[..., Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        parameters = inspect.signature(factory).parameters.values()
        takes = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
        raise RewardError(
            f"reward function {source.text!r}: {error}. It takes ({takes}); set them with "
            f"reward_kwargs: {{{source.text}: {{...}}}}"
        ) from error
    try:
        return factory(**kwargs)
    except (Exception, SystemExit) as error:  # other people's code raises anything
        raise RewardError(
            f"reward function {source.text!r}: making it with reward_kwargs failed with "
            f"{type(error).__name__}: {error}"
        ) from error


def _module(source: Source) -> ModuleType:
    who = f"reward function {source.text!r}"
    try:
        if source.kind == "module":
            return importlib.import_module(source.target)
        return _import_file(Path(source.target))
    except ModuleNotFoundError as error:
        where = f" (cwd {os.getcwd()})" if error.name == source.target.split(".")[0] else ""
        raise RewardError(f"{who}: {error}{where}") from error
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise RewardError(
            f"{who}: importing {source.target} failed with {type(error).__name__}: {error}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    # Its neighbours are importable, as they would be if the file were run, but for those that are
    # named like a library: whatever else is imported would get them, too.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"reward_file_{path.stem}"  # not the bare stem: the file may be called random.py
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # given for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickle expect it
    spec.loader.exec_module(module)
    return module


def _attribute(source: Source, module: ModuleType) -> Callable[..., Any]:
    function = getattr(module, source.attribute, None)
    if callable(function):
        return function
    names = [name for name, value in vars(module).items() if callable(value)]
    problem = "has no" if function is None else "holds no function in"
    raise RewardError(
        f"reward function {source.text!r}: {source.target} {problem} {source.attribute!r}."
        + did_you_mean(source.attribute, names)
    )
