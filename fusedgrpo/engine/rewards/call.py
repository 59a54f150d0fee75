"""One call of a reward function under TRL's convention, and the check of what it returns.

Runs in the trainer's process and in reward workers, so it does without torch.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
import reprlib
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from fusedgrpo.engine.columns import CONVENTION
from fusedgrpo.engine.interrupts import Interrupted
from fusedgrpo.engine.rewards.own_copy import own_containers, own_copy
from fusedgrpo.errors import RewardError, did_you_mean

LARGEST_REWARD = 1e6


class CallFailed(Exception):
    """A reward function raised, hung or died.

    repeatable: the same call on one completion may well succeed (false for a worker that had
    to be killed). details: the traceback of the function, where there is one.
    """

    def __init__(self, summary: str, *, details: str = "", repeatable: bool = True):
        super().__init__(summary)
        self.details = details
        self.repeatable = repeatable


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of a call of the reward functions: B completions, flat, group by group.

    environments: by which those that they acted in go, None without any.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: dict[str, list[Any]]
    trainer_state: Any
    rows: list[int]
    environments: Sequence[Hashable] | None = None

    def __len__(self) -> int:
        return len(self.completions)

    def only(self, index: int) -> Batch:
        """Completion ``index`` as a batch of one."""
        one = slice(index, index + 1)
        return replace(
            self,
            prompts=self.prompts[one],
            completions=self.completions[one],
            completion_ids=self.completion_ids[one],
            columns={name: values[one] for name, values in self.columns.items()},
            rows=self.rows[one],
            environments=None if self.environments is None else self.environments[one],
        )


@dataclass(slots=True)
class Reply:
    """The answer of a function to a batch.

    values: B floats, NaN where the function does not apply. failures: why there is no reward for
    a completion that there should be one for (its value is NaN), by its index. extra: column -> B
    plain values. metrics: name -> the values logged under it. seconds: wall time of the call.
    """

    values: list[float]
    failures: dict[int, str] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


def callable_name(function: Callable[..., Any]) -> str:
    """TRL's name for a reward function: behind partials, ``__name__`` or the class's name."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


class RewardCall:
    """A reward function, called with what it takes of the convention and the data columns.

    kwargs: constant arguments from ``reward_kwargs``. interrupts: whether a KeyboardInterrupt that
    comes out of the function now is a Ctrl-C, and not the function's own. Raises
    :class:`RewardError` where the function cannot take its arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        interrupts: Callable[[], bool] = lambda: True,
    ):
        self.name = callable_name(function)
        self._function = function
        self._kwargs = dict(kwargs or {})
        self.interrupts = interrupts
        self._accepts, required = _signature(function)
        self._required = required - self._kwargs.keys()
        for name in self._kwargs:
            if name in CONVENTION:
                raise RewardError(
                    f"reward_kwargs of {self.name!r}: {name!r} is given by the trainer"
                )
            if self._accepts is not None and name not in self._accepts:
                hint = did_you_mean(name, self._accepts - set(CONVENTION))
                raise RewardError(
                    f"reward_kwargs of {self.name!r}: the function takes no {name!r}.{hint}"
                )

    def takes(self, argument: str) -> bool | None:
        """Whether the function names ``argument``; None if it does not and takes any."""
        if self._accepts is None:
            return True if argument in self._required else None
        return argument in self._accepts

    @property
    def is_async(self) -> bool:
        """Whether a call gives a coroutine (also for partials and instances)."""
        function = self._function
        while isinstance(function, functools.partial):
            function = function.func
        call = getattr(function, "__call__", None)  # noqa: B004 - the method is what is asked
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

    def __call__(self, batch: Batch) -> Reply:
        """Raises :class:`CallFailed` if the function does, :class:`RewardError` for bad input
        and for an answer that is not B rewards."""
        reply = Reply([])
        arguments = self._arguments(batch, reply)
        start = time.perf_counter()
        try:
            output = _listed(self._function(**arguments))
        except BaseException as error:
            if self._is_the_runs(error):
                raise
            raise failed(error) from error
        return self._checked(reply, output, batch, start)

    async def call_async(self, batch: Batch) -> Reply:
        """:meth:`__call__` for an async function."""
        reply = Reply([])
        arguments = self._arguments(batch, reply)
        start = time.perf_counter()
        try:
            output = _listed(await self._function(**arguments))
        except BaseException as error:
            if self._is_the_runs(error) or isinstance(error, GeneratorExit):
                raise  # GeneratorExit: Python says it to a coroutine that nobody awaits any more
            raise failed(error) from error
        return self._checked(reply, output, batch, start)

    def _is_the_runs(self, error: BaseException) -> bool:
        """Whether ``error`` is a word to the run. Other people's code raises anything, and whatever
        it is, ``sys.exit`` included, is a failure of this function and no more."""
        return isinstance(error, (RewardError, Interrupted)) or (
            isinstance(error, KeyboardInterrupt) and self.interrupts()
        )

    def _arguments(self, batch: Batch, reply: Reply) -> dict[str, Any]:
        for column in batch.columns:
            if column in CONVENTION:
                raise RewardError(
                    f"data column {column!r} has the name of an argument that every reward "
                    "function gets; rename the column"
                )
            if column in self._kwargs:
                raise RewardError(
                    f"reward_kwargs of {self.name!r}: {column!r} is also a column of the data; "
                    "rename one of the two"
                )

        def log_extra(column: str, values: Any) -> None:
            reply.extra[column] = [_plain(value) for value in values]

        def log_metric(name: str, value: Any) -> None:
            reply.metrics.setdefault(name, []).append(float(value))

        # One copy for each completion: a group shares its row, a rollout is scored by several.
        shared = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "completion_ids": batch.completion_ids,
            **batch.columns,
        }
        given = {"trainer_state", "log_extra", "log_metric", *shared, *self._kwargs}
        missing = sorted(self._required - given)
        if missing:
            raise RewardError(
                f"reward function {self.name!r} needs {', '.join(map(repr, missing))}, which is "
                f"no column of the data (columns: {', '.join(sorted(batch.columns)) or 'none'})."
                + did_you_mean(missing[0], batch.columns)
            )
        taken = given if self._accepts is None else given & self._accepts
        arguments: dict[str, Any] = {
            name: [own_copy(value, f"{name!r}") for value in values]
            for name, values in shared.items()
            if name in taken
        }
        arguments |= {
            name: own_containers(value) for name, value in self._kwargs.items() if name in taken
        }
        rest = {
            "trainer_state": copy.copy(batch.trainer_state),
            "log_extra": log_extra,
            "log_metric": log_metric,
        }
        return arguments | {name: value for name, value in rest.items() if name in taken}

    def _checked(self, reply: Reply, output: Any, batch: Batch, start: float) -> Reply:
        reply.seconds = time.perf_counter() - start
        who, count = f"reward function {self.name!r}", len(batch)
        if not isinstance(output, list):
            raise RewardError(
                f"{who} returned {_shown(output)} ({type(output).__name__}), expected a "
                f"list of {count} numbers, one for each completion"
            )
        if len(output) != count:
            raise RewardError(
                f"{who} returned {len(output)}, expected {count}: one reward for each completion"
            )
        for column, values in reply.extra.items():
            if len(values) != count:
                raise RewardError(
                    f"{who} called log_extra({column!r}, ...) with {len(values)} values, "
                    f"expected {count}"
                )
        for index, value in enumerate(output):
            where = f"for completion {index} (data row {batch.rows[index]})"
            number = as_number(value)
            if number is None:
                raise RewardError(
                    f"{who} returned {_shown(value)} ({type(value).__name__}) {where}; "
                    "expected an int, float, bool, 0-d tensor, or None where it does not apply"
                )
            if value is not None and not math.isfinite(number):
                reply.failures[index] = (
                    f"it returned {_shown(value)}, which is no finite number; a function that does "
                    "not apply to a completion returns None"
                )
                number = math.nan
            if abs(number) > LARGEST_REWARD:
                raise RewardError(
                    f"{who} returned {_shown(value)} {where}; expected a finite number of at most "
                    f"{LARGEST_REWARD:g} in size, or None where it does not apply"
                )
            reply.values.append(number)
        return reply


def _signature(function: Callable[..., Any]) -> tuple[frozenset[str] | None, frozenset[str]]:
    """The keywords that a function takes (None: any) and those that it cannot do without."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C, says nothing about itself
        return None, frozenset()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = frozenset(p.name for p in named if p.default is p.empty)
    return None if takes_any else frozenset(p.name for p in named), required


def _listed(output: Any) -> Any:
    """Arrays, tuples and generators as a list; what is no sequence of rewards as it is."""
    if isinstance(output, (str, bytes, Mapping, Set)) or getattr(output, "ndim", None) == 0:
        return output
    return list(output) if hasattr(output, "__iter__") else output


def as_number(value: Any) -> float | None:
    """A reward as a float (None -> NaN), or None for what is not a number."""
    if value is None:
        return math.nan
    if getattr(value, "ndim", None) == 0:  # NumPy scalar, 0-d array, 0-d tensor
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer with hundreds of digits
        return -sys.float_info.max if value < 0 else sys.float_info.max


def _shown(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except Exception as error:  # noqa: BLE001 - other people's classes; integers of 5,000 digits
        return f"<no repr: {type(error).__name__}>"


def _plain(value: Any) -> Any:
    """Something that JSON and a table can hold."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    for kind in (bool, int, float, str):  # enums and other subclasses included
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)


def failed(error: BaseException) -> CallFailed:
    """The failed call that an error out of a reward function makes."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    summary = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
    return CallFailed(summary, details="".join(traceback.format_exception(error)))
