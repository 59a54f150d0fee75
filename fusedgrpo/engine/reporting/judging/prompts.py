"""Held-out prompts one by one: which were solved before, which are now, and what was said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusedgrpo.engine.reporting.held_out_log import Checks, sets_of
from fusedgrpo.engine.reporting.metrics_log import finite

Status = Literal["newly solved", "better", "same", "worse", "lost", "solved", "never"]
ORDER: tuple[Status, ...] = ("lost", "worse", "newly solved", "better", "same", "never", "solved")


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt. before, after: the records of its answers in the first and in the last check.
    A prompt is solved when its reward is the greatest that any answer got, and that is above 0."""

    status: Status
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def gained(self) -> float:
        return (finite(self.after["reward"]) or 0.0) - (finite(self.before["reward"]) or 0.0)


def compared(checks: Checks) -> list[Compared]:
    """The prompts that the first and the last check have, those that changed first: a loss before a
    gain, a great one before a small one."""
    if len(checks) < 2:
        return []
    first, last = checks[min(checks)], checks[max(checks)]
    found = []
    for name in sets_of(checks):
        before, after = _by_row(first, name), _by_row(last, name)
        rewards = [finite(record["reward"]) for record in (*before.values(), *after.values())]
        top = max((value for value in rewards if value is not None), default=0.0)
        for row in before.keys() & after.keys():
            status = _status(before[row], after[row], top)
            found.append(Compared(status, before[row], after[row]))
    return sorted(found, key=lambda one: (ORDER.index(one.status), -abs(one.gained)))


def counts(prompts: Sequence[Compared]) -> dict[str, int]:
    """How many prompts have which status, in the order of ``ORDER``; none that no prompt has."""
    counted = Counter(one.status for one in prompts)
    return {status: counted[status] for status in ORDER if counted[status]}


def _status(before: Mapping[str, Any], after: Mapping[str, Any], top: float) -> Status:
    was, now = finite(before["reward"]), finite(after["reward"])
    if was is None or now is None:
        return "same"
    solved_before, solved_after = (top > 0 and value >= top for value in (was, now))
    if solved_before:
        return "solved" if solved_after else "lost"
    if solved_after:
        return "newly solved"
    if was == now:
        return "never" if was <= 0 else "same"
    return "better" if now > was else "worse"


def _by_row(records: Sequence[Mapping[str, Any]], name: str) -> dict[Any, Mapping[str, Any]]:
    return {
        record["row"]: record
        for record in records
        if (record.get("set") or "") == name and "row" in record and "reward" in record
    }
