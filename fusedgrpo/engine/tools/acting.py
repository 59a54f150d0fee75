"""The process of one completion: its environment, and the calls of its tools.

Runs in a fork of the nursery, in the main thread (so ``signal.alarm`` works). Each request of the
trainer is answered by ``("began", indices, side by side)`` right before code of the user's runs,
and then by what came of it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import pickle
import random
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import cloudpickle

from fusedgrpo.engine.child_process import Answers
from fusedgrpo.engine.data.rows import is_deep
from fusedgrpo.engine.rewards.call import LARGEST_REWARD, as_number
from fusedgrpo.engine.tools.describing import methods
from fusedgrpo.engine.tools.loading import Loaded
from fusedgrpo.errors import brief, reason

_LONGEST_TRACE = 20_000  # characters


def act(answers: Answers, loaded: Loaded) -> None:
    """Answer requests until the trainer wants no more: ``("reset", environment, columns, seed)``,
    ``("call", [(name, arguments), ...], seed, timeout, limit)``, ``("reward",)``, ``("copy",)``."""
    actor = _Actor(answers, loaded)
    while True:
        try:
            request = answers.receive()
        except EOFError:
            return
        try:
            kind, *arguments = pickle.loads(request)
        except Exception as error:  # noqa: BLE001 - columns of the data, whose classes raise anything
            answers.send("failed", f"a value cannot be rebuilt: {_said(error)}", "")
            continue
        if kind == "call":
            actor.call(*arguments)
            continue
        answers.send("began", (), False)
        try:
            answer = getattr(actor, kind)(*arguments)
        except BaseException as error:  # noqa: BLE001 - their code raises anything, sys.exit included
            answer = ("failed", _said(error), _trace(error))
        answers.send(*answer)


def error_text(text: str) -> str:
    """An error as the content of a tool's message, in TRL's form."""
    return str({"error": text})


class _Actor:
    def __init__(self, answers: Answers, loaded: Loaded):
        self._answers = answers
        self._loaded = loaded
        self._tools = {tool.__name__: tool for tool in loaded.tools}
        self._environment: Any = None
        self._by_value = False
        self._loop = asyncio.new_event_loop()  # one for all calls: clients are tied to their loop

    def reset(self, name: str | None, columns: Mapping[str, Any], seed: int) -> tuple[Any, ...]:
        _seed(seed)
        self._environment = self._loaded.environments[name]()
        for method in methods(type(self._environment)):
            self._tools[method] = getattr(self._environment, method)
        observation = self._awaited(self._environment.reset(**columns))
        if isinstance(observation, str):
            return "observation", _clean(observation)
        if observation is None:
            return "observation", None
        try:
            if not isinstance(observation, list):
                raise TypeError
            return "observation", json.loads(json.dumps(observation))
        except (TypeError, ValueError):
            return (
                "failed",
                f"reset returned {brief(observation)} ({type(observation).__name__}), expected "
                "text, a list of content parts that JSON can hold, or None",
                "",
            )

    def reward(self) -> tuple[Any, ...]:
        value = self._awaited(self._environment.get_reward())
        number = as_number(value)
        if (
            number is None
            or abs(number) > LARGEST_REWARD
            or (number != number and value is not None)
        ):
            return (
                "failed",
                f"get_reward returned {brief(value)} ({type(value).__name__}), expected a finite "
                f"number of at most {LARGEST_REWARD:g} in size, or None where it does not apply",
                "",
            )
        return "reward", number

    def copy(self) -> tuple[Any, ...]:
        module = sys.modules.get(type(self._environment).__module__)
        if module is not None and module.__name__.startswith("user_file_"):
            cloudpickle.register_pickle_by_value(module)  # the trainer has no such module
        return "copy", cloudpickle.dumps(self._environment)

    def call(
        self, calls: Sequence[tuple[str, Any]], seed: int, timeout: float | None, limit: int
    ) -> None:
        """Sync ones in order, then async ones side by side; an answer for each when it is done."""
        _seed(seed)
        waiting: dict[int, Awaitable[Any]] = {}
        for index, (name, arguments) in enumerate(calls):
            problem = self._problem(name, arguments)
            if problem:
                self._result(index, error_text(problem[:limit]), failed=True)
                continue
            if not inspect.iscoroutinefunction(self._tools[name]):
                self._answers.send("began", (index,), False)
            try:
                value = self._tools[name](**arguments)
                if inspect.isawaitable(value):
                    waiting[index] = value
                    continue
                content, listed = _text(value, limit), _listed(value, limit)
            except BaseException as error:  # noqa: BLE001 - their code raises anything
                self._failed(index, error, limit)
            else:
                self._result(index, content, listed)
        if waiting:
            self._answers.send("began", tuple(waiting), True)
            self._loop.run_until_complete(self._side_by_side(waiting, timeout, limit))
        self._answers.send("done")

    def _problem(self, name: str, arguments: Any) -> str:
        """Why a call of the policy's cannot be made, for the policy; empty where it can."""
        if name not in self._tools:
            return f"there is no tool {brief(name)}; there are {', '.join(self._tools)}"
        if not isinstance(arguments, Mapping):
            return f"{name}: arguments are {brief(arguments)}, expected them by their names"
        signature = inspect.signature(self._tools[name])
        try:
            signature.bind(**arguments)
        except TypeError as error:
            return f"{name}: {error}; it takes {signature}"
        return ""

    async def _side_by_side(
        self, waiting: Mapping[int, Awaitable[Any]], timeout: float | None, limit: int
    ) -> None:
        answered = set()

        async def one(index: int, value: Awaitable[Any]) -> None:
            try:
                found = await value
                content, listed = _text(found, limit), _listed(found, limit)
            except BaseException as error:  # noqa: BLE001 - their code raises anything
                if index not in answered:
                    self._failed(index, error, limit)
            else:
                if index not in answered:
                    self._result(index, content, listed)
            answered.add(index)

        tasks = {
            asyncio.ensure_future(one(index, value)): index for index, value in waiting.items()
        }
        _, late = await asyncio.wait(tasks, timeout=timeout)
        for task in late:
            text = f"it took more than {timeout:g} seconds"
            self._result(tasks[task], error_text(text), failed=True, trace=text)
            answered.add(tasks[task])
            task.cancel()

    def _awaited(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value

        async def waited() -> Any:
            return await value

        return self._loop.run_until_complete(waited())

    def _failed(self, index: int, error: BaseException, limit: int) -> None:
        text = error_text(_said(error)[:limit])
        self._result(index, _clean(text), failed=True, trace=_trace(error))

    def _result(
        self,
        index: int,
        content: str,
        listed: str = "",
        *,
        failed: bool = False,
        trace: str = "",
    ) -> None:
        """listed: what it returned, if that is a list, in JSON. trace: of a failure that is the
        tool's; the policy's own have none."""
        self._answers.send("result", index, content, failed, trace, listed)


def _text(value: Any, limit: int) -> str:
    """The text of a tool's answer: of parts of content, what they say. Raises what its ``__str__``
    does, and TypeError for parts that are no text."""
    if _are_parts(value):
        if any(part["type"] != "text" for part in value):
            kinds = ", ".join(brief(part["type"]) for part in value)
            raise TypeError(f"it returned {kinds}, and the policy reads text alone")
        value = "".join(str(part.get("text", "")) for part in value)
    text = str.__str__(str(value))  # of no class of theirs
    rest = len(text) - limit
    if rest > 0:
        text = f"{text[:limit]} ... ({rest:,} more characters were cut)"
    return _clean(text)


def _are_parts(value: Any) -> bool:
    """Whether it is content as messages have it in parts: ``[{"type": "text", "text": ..}]``."""
    if not isinstance(value, list) or not value:
        return False
    # Rows of a table may have a column of that name, too.
    return all(
        isinstance(part, dict) and part.get("type") in ("text", "image") and part["type"] in part
        for part in value
    )


def _listed(value: Any, limit: int) -> str:
    """A tool's list as JSON; empty for what is none, or takes more characters than the limit."""
    if not isinstance(value, list) or is_deep(value):
        return ""
    try:
        text = _clean(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError):
        return ""
    return text if len(text) <= limit else ""


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which no tokenizer takes."""
    return str.__str__(text).encode("utf-8", "replace").decode("utf-8")


def _said(error: BaseException) -> str:
    try:
        return _clean(reason(error))
    except Exception:  # noqa: BLE001 - the error's own __str__
        return type(error).__name__


def _trace(error: BaseException) -> str:
    return _clean("".join(traceback.format_exception(error))[-_LONGEST_TRACE:])


def _seed(seed: int) -> None:
    random.seed(seed)
    for name, function, bits in (("numpy", "random.seed", 32), ("torch", "manual_seed", 63)):
        module: Callable[..., Any] | Any = sys.modules.get(name)
        if module is not None:
            for attribute in function.split("."):
                module = getattr(module, attribute)
            module(seed % 2**bits)
