"""Code of the user's by its name: ``file.py:name`` or ``module:name``.

Rewards, tools, losses, advantage estimators, samplers and data formats are found this way.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fusedgrpo.errors import FusedGRPOError, brief, did_you_mean, reason


def code_folders(search_paths: Sequence[str | Path] = ()) -> list[Path]:
    """Where relative files are looked for: the working directory, then ``search_paths``."""
    return list(dict.fromkeys(Path(path).resolve() for path in (os.getcwd(), *search_paths)))


@dataclass(frozen=True, slots=True)
class NamedCode:
    """text: as the user gave it. target: the absolute path of a file if ``is_file``, else a
    module."""

    text: str
    is_file: bool
    target: str
    attribute: str


def locate_code(
    text: str, folders: Sequence[Path], who: str, error: type[FusedGRPOError]
) -> NamedCode | None:
    """Find what ``text`` names, without importing anything; None where it has no ``:``.

    folders: where relative files are looked for, in this order. who: what it is to be, for
    messages. Raises ``error`` for a file that is not there.
    """
    target, colon, attribute = text.rpartition(":")
    if not colon:
        return None
    if not target.endswith(".py"):
        return NamedCode(text, False, target, attribute)
    paths = []
    try:
        for folder in folders:
            paths.append((folder / Path(target).expanduser()).resolve())
            if paths[-1].is_file():
                return NamedCode(text, True, str(paths[-1]), attribute)
    except (OSError, ValueError, RuntimeError) as problem:  # NUL, thousands of letters, ~nobody
        raise error(f"{who} {brief(text)}: no such file ({reason(problem)})") from problem
    looked = ", ".join(map(str, dict.fromkeys(paths)))
    raise error(f"{who} {text!r}: no such file (looked for {looked})")


def load_code(code: NamedCode, who: str, error: type[FusedGRPOError]) -> Callable[..., Any]:
    """Import the function or class that ``code`` names. Raises ``error``."""
    return callable_of(load_module(code, who, error), code, who, error)


def callable_of(
    module: ModuleType, code: NamedCode, who: str, error: type[FusedGRPOError]
) -> Callable[..., Any]:
    """The function or class that ``code`` names in its module. Raises ``error``."""
    found = getattr(module, code.attribute, None)
    if callable(found):
        return found
    names = [name for name, value in vars(module).items() if callable(value)]
    problem = "has no" if found is None else "holds no function in"
    raise error(
        f"{who} {code.text!r}: {code.target} {problem} {code.attribute!r}."
        + did_you_mean(code.attribute, names)
    )


def load_module(code: NamedCode, who: str, error: type[FusedGRPOError]) -> ModuleType:
    """Import what ``code`` is in; a file anew each time. Raises ``error``."""
    who = f"{who} {code.text!r}"
    try:
        if code.is_file:
            return _import_file(Path(code.target))
        return importlib.import_module(code.target)
    except ModuleNotFoundError as problem:
        where = f" (cwd {os.getcwd()})" if problem.name == code.target.split(".")[0] else ""
        raise error(f"{who}: {problem}{where}") from problem
    except (Exception, SystemExit) as problem:  # a user's module may raise anything
        raise error(
            f"{who}: importing {code.target} failed with {type(problem).__name__}: {problem}"
        ) from problem


def _import_file(path: Path) -> ModuleType:
    # Its neighbours are importable, as they would be if the file were run, but for those that are
    # named like a library: whatever else is imported would get them, too.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    name = f"user_file_{path.stem}"  # not the bare stem: the file may be called random.py
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # given for every .py file
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses and pickle expect it
    spec.loader.exec_module(module)
    return module
