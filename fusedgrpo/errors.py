"""Every error that fusedgrpo raises on purpose.

A message says what was given, what was expected and what to do. The command line turns
:class:`ConfigError` and :class:`DataError` into exit code 2 and the others into exit code 1.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


class FusedGRPOError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(FusedGRPOError, ValueError):
    """The configuration cannot be run. ``problems`` holds one line per violation."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            text = self.problems[0]
        else:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            text = f"{len(self.problems)} problems in the configuration:{lines}"
        super().__init__(text)


class VersionError(FusedGRPOError, ImportError):
    """A package that is installed is older than it has to be."""


class DataError(FusedGRPOError, ValueError):
    """A data set, one of its rows or one of its columns cannot be used."""


class RewardError(FusedGRPOError, ValueError):
    """A reward function cannot be found, failed, or returned something that is no reward."""


class ToolError(FusedGRPOError, RuntimeError):
    """A tool or an environment cannot be loaded or begun, or it failed where that ends the run."""


class SamplerError(FusedGRPOError, ValueError):
    """A sampler of the user's returned something that is no rollout, or none of the model's tokens
    can follow in what a completion has to match."""


class ModelError(FusedGRPOError, ValueError):
    """A model, tokenizer or adapter cannot be loaded or does not fit the rest."""


class CheckpointError(FusedGRPOError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another run."""


class OutputDirError(FusedGRPOError, OSError):
    """The output directory cannot be written or is in use by another run."""


class ProcessError(FusedGRPOError, RuntimeError):
    """Another of the processes that train together has failed."""


class MemoryExhaustedError(FusedGRPOError, MemoryError):
    """There is not enough memory even for the least that can be done at once."""


class PlanError(FusedGRPOError, RuntimeError):
    """The memory of a model cannot be planned. It may train all the same."""


class NonFiniteError(FusedGRPOError, ArithmeticError):
    """Weights, logits, a loss or a gradient are NaN or infinite. No such weights are saved."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of ``known``, or an empty string."""
    if len(name) > 200:  # no slip of the pen, and slow to compare
        return ""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def brief(value: Any) -> str:
    """``repr(value)`` for a message: of bounded length, whatever the value holds or refers to."""
    return _cut(_brief.repr(value), 300)


def reason(error: BaseException) -> str:
    """The type and text of somebody else's exception in one line of bounded length."""
    text = _cut(" ".join(str(error).split()), 600)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 100]} ... {text[-90:]}"


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to write integers of thousands of digits.
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"


_brief = _Brief()
