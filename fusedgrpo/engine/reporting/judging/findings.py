"""One thing that the figures of a run show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.judging.changes import CONFIDENCE, Change

Level = Literal["good", "note", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """key: which rule found it. level: good and bad ones decide the verdict, a warning keeps it
    from being green. steps: those that it is about, first and last. change: option -> value, what
    to do about it; advice: the same in words."""

    key: str
    level: Level
    text: str
    steps: tuple[int, int] | None = None
    advice: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)


def in_words(change: Change) -> str:
    """``0.60 to 0.20 (-0.40 ± 0.11, 40 prompts)``."""
    where = f", {change.prompts} prompts" if change.prompts else ""
    return (
        f"{number(change.first)} to {number(change.last)} "
        f"({_short(change.size, '+')} ± {_short(change.margin)}{where})"
    )


def _short(value: float, sign: str = "") -> str:
    """Two significant digits, and all of those before the point."""
    return f"{value:{sign}.0f}" if 100 <= abs(value) < 1e5 else f"{value:{sign}.2g}"


def when(steps: tuple[int, int] | None) -> str:
    """``steps 12 to 20``, ``step 12``; "before training" for step 0."""
    if steps is None:
        return ""
    first, last = steps
    if last == 0:
        return "before training"
    return f"step {last}" if first == last else f"steps {first} to {last}"


INTERVALS = f"After ± is half of an interval of {CONFIDENCE:.0%}."
