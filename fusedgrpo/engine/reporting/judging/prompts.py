"""Prompts one by one: which were solved before, which are now, and what was said."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fusedgrpo.engine.reporting.held_out_log import Checks, set_of, sets_of
from fusedgrpo.engine.reporting.metrics_log import finite

Status = Literal["newly solved", "better", "same", "worse", "lost", "solved", "never"]
ORDER: tuple[Status, ...] = ("lost", "worse", "newly solved", "better", "same", "never", "solved")


def best_reward(rewards: Iterable[float | None]) -> float | None:
    """The greatest of ``rewards``, which a prompt must have to be solved; None where none is above
    0, and then none is solved. None and NaN among them count as no reward."""
    known = [value for value in rewards if value is not None and not math.isnan(value)]
    top = max(known, default=0.0)
    return top if top > 0 else None


def is_solved(reward: Any, top: float | None) -> Any:
    """Whether ``reward``, a number or an array, is that of a solved prompt, where ``top`` is the
    ``best_reward``."""
    return reward >= (math.inf if top is None else top)


def status_of(before: float | None, after: float | None, top: float | None) -> Status:
    """The outcome of a prompt, by its rewards and the ``best_reward``; without one, "same"."""
    if before is None or after is None:
        return "same"
    solved_before, solved_after = is_solved(before, top), is_solved(after, top)
    if solved_before:
        return "solved" if solved_after else "lost"
    if solved_after:
        return "newly solved"
    if before == after:
        return "never" if before <= 0 else "same"
    return "better" if after > before else "worse"


def place(status: Status, gained: float) -> tuple[int, float]:
    """A key to sort prompts by: those that changed first, a loss before a gain, a great one before
    a small one."""
    return ORDER.index(status), -abs(gained)


def counted(statuses: Iterable[Status]) -> dict[Status, int]:
    """How many there are of each, in the order of ``ORDER``; none that there are none of."""
    found = Counter(statuses)
    return {status: found[status] for status in ORDER if found[status]}


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt. before, after: the records of its answers in the first and in the last check."""

    status: Status
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def gained(self) -> float:
        return (finite(self.after["reward"]) or 0.0) - (finite(self.before["reward"]) or 0.0)


def compared(checks: Checks) -> list[Compared]:
    """The prompts that the first and the last check have, sorted by ``place``."""
    if len(checks) < 2:
        return []
    first, last = checks[min(checks)], checks[max(checks)]
    found = []
    for name in sets_of(checks):
        before, after = _by_row(first, name), _by_row(last, name)
        top = best_reward(
            finite(record["reward"]) for record in (*before.values(), *after.values())
        )
        for row in before.keys() & after.keys():
            was, now = finite(before[row]["reward"]), finite(after[row]["reward"])
            found.append(Compared(status_of(was, now, top), before[row], after[row]))
    return sorted(found, key=lambda one: place(one.status, one.gained))


def counts(prompts: Sequence[Compared]) -> dict[Status, int]:
    """How many prompts have which status; see ``counted``."""
    return counted(one.status for one in prompts)


def _by_row(records: Sequence[Mapping[str, Any]], name: str) -> dict[Any, Mapping[str, Any]]:
    return {
        record["row"]: record
        for record in records
        if set_of(record) == name and isinstance(record.get("row"), int) and "reward" in record
    }
