"""Results that a run has computed and not yet written to its logs.

It is part of every checkpoint, so that a run that stops before a row is written, or on a disk that
is full, writes it when it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fusedgrpo.engine.reporting.metrics_log import Row, to_json_line


@dataclass(slots=True)
class Unwritten:
    """rows: of steps that are counted, in order. completions: step that sampled -> records.
    evaluations: step -> records of what its evaluation sampled. evaluation_due: the last row still
    waits for the evaluation of its step."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    completions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    evaluation_due: bool = False

    @property
    def complete_rows(self) -> list[dict[str, Any]]:
        """The rows that wait for nothing."""
        return self.rows[:-1] if self.evaluation_due else list(self.rows)

    def __bool__(self) -> bool:
        return bool(self.rows or self.completions or self.evaluations)

    def state(self, unsynced: Sequence[Row]) -> dict[str, Any]:
        """As JSON values, with the rows that are written but maybe not on the disk."""
        return {
            "rows": [_as_read(row) for row in [*unsynced, *self.rows]],
            "completions": _as_state(self.completions),
            "evaluations": _as_state(self.evaluations),
            "evaluation_due": self.evaluation_due,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Unwritten:
        """The inverse of ``state``."""
        completions, evaluations = (
            {int(step): records for step, records in state.get(key, {}).items()}
            for key in ("completions", "evaluations")  # versions before wrote none of these
        )
        return cls(state["rows"], completions, evaluations, state["evaluation_due"])


def _as_state(by_step: Mapping[int, Sequence[Row]]) -> dict[str, Any]:
    return {str(step): [_as_read(record) for record in by_step[step]] for step in by_step}


def _as_read(row: Row) -> Any:
    """A row as it comes back from its file."""
    return json.loads(to_json_line(row))
