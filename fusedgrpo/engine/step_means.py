"""The metrics of the steps since the last log, as the one entry that TRL's trainer logs of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Of these the last value is the one that counts; of memory/ it is the largest; the rest are means.
_LAST = ("epoch", "grad_norm", "learning_rate", "num_tokens")
_LEFT_OUT = ("step",)


class StepMeans:
    """Adds up rows of metrics until they are logged. As in TRL, what is not a number in one step
    counts in none; a metric without any number is None."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.last: dict[str, Any] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Count the row of a step, in which there is nothing of an evaluation yet."""
        for name, value in row.items():
            if name in _LEFT_OUT or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if name in _LAST:
                self.last[name] = value
            elif name.startswith("memory/"):
                self.last[name] = max(value, self.last.get(name, value))
            else:
                total = self.sums.setdefault(name, [0.0, 0])
                # An infinite loss is of a step that was skipped: it trained nothing.
                if not math.isnan(value) and not (name == "loss" and math.isinf(value)):
                    total[0] += value
                    total[1] += 1

    def take(self) -> dict[str, Any]:
        """The entry, and begin anew; empty if no step was counted since the last time."""
        means = {name: total / n if n else None for name, (total, n) in self.sums.items()}
        first = {name: means.pop(name) for name in ("loss",) if name in means}
        entry = {**first, **self.last, **means}
        self.sums, self.last = {}, {}
        return entry

    def take_rest(self) -> dict[str, Any]:
        """``take``, for the last entry of a run, which is that of no step: as in TRL, without the
        loss, the gradient and the learning rate of one."""
        of_steps = ("loss", "grad_norm", "learning_rate")
        return {name: value for name, value in self.take().items() if name not in of_steps}

    def state(self) -> dict[str, Any]:
        return {"sums": {name: list(total) for name, total in self.sums.items()}, "last": self.last}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepMeans:
        made = cls()
        made.sums = {name: list(total) for name, total in state["sums"].items()}
        made.last = dict(state["last"])
        return made
