"""Callbacks that show more than a step's line: advice, and completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedgrpo.engine.callbacks import Callback
from fusedgrpo.engine.reporting.advisor import Advisor
from fusedgrpo.engine.reporting.display import Display
from fusedgrpo.engine.reporting.metrics_log import Row


class ShownAdvice(Callback):
    """Shows what the advisor makes of each step."""

    def __init__(self, advisor: Advisor, display: Display):
        self.advisor = advisor
        self.display = display

    def on_step(self, row: Row) -> None:
        begun = self.advisor.observe(row)
        self.display.advice(begun, self.advisor.ended, self.advisor.current)


class ShownCompletions(Callback):
    """Shows completions of the first rollout in every so many ``steps``, and at most so many."""

    def __init__(self, display: Display, limit: int | None, steps: int):
        self.display = display
        self.limit = limit
        self.steps = steps
        self._shown: int | None = None  # steps / self.steps, rounded down

    def on_rollout(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        part = (step - 1) // self.steps
        if part != self._shown:
            self._shown = part
            shown = records[: self.limit]
            self.display.completions(step, shown, more=len(records) - len(shown))
