"""From a name in ``reward_funcs`` to a function.

Looked up in this order: a built-in name, ``file.py:function``, ``module:function``, a reward
model's directory, its Hub id (has a ``/``), dotted ``module.function``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusedgrpo.engine.rewards.builtin import FACTORIES, FUNCTIONS
from fusedgrpo.engine.rewards.call import RewardCall
from fusedgrpo.errors import RewardError, did_you_mean
from fusedgrpo.named_code import NamedCode, load_code, locate_code

WHO = "reward function"


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
    if code := locate_code(text, folders, WHO, RewardError):
        return Source("file" if code.is_file else "module", text, code.target, code.attribute)
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
        code = NamedCode(source.text, source.kind == "file", source.target, source.attribute)
        function = load_code(code, WHO, RewardError)
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
