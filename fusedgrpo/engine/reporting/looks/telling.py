"""Groups worth reading: the best, the worst and the most divided of the last rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.engine.reporting.looks.tables import Groups, groups_of


@dataclass(frozen=True)
class TellingGroup:
    """step: whose rollout. group: its number in it. row: of the data. mean, spread: of its rewards,
    the spread is their standard deviation. records: its completions, as they were logged."""

    step: int
    group: int
    row: int
    mean: float
    spread: float
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class TellingGroups:
    """best, worst: by mean reward; divided: the greatest spread. No group is there twice: in this
    order each is chosen from those that are left, the latest of equals. None: no group has a
    reward; none is worse than the best; in none of those that are left do rewards differ. first,
    last: the steps of the rollouts that they are from, None where there are none."""

    best: TellingGroup | None
    worst: TellingGroup | None
    divided: TellingGroup | None
    first: int | None
    last: int | None


def telling_groups(completions: Completions, last: float = 0.1) -> TellingGroups:
    """From the ``last`` share of the rollouts, one at least."""
    steps = completions.steps
    if not steps:
        return TellingGroups(None, None, None, None, None)
    begin = steps[-max(1, round(last * len(steps)))]
    groups = groups_of(completions.scores)
    left = (groups.step >= begin) & (groups.scored > 0)
    best = _take(groups.mean, left)
    lower = left if best is None else left & (groups.mean < groups.mean[best])
    worst = _take(-groups.mean, lower)
    if worst is not None:
        left[worst] = False
    divided = _take(groups.spread, left & (groups.spread > 0))
    return TellingGroups(
        best=_read(completions, groups, best),
        worst=_read(completions, groups, worst),
        divided=_read(completions, groups, divided),
        first=begin,
        last=steps[-1],
    )


def _take(value: np.ndarray, left: np.ndarray) -> int | None:
    """The last index of the greatest ``value [G]`` of those that are ``left [G]``, and no longer
    are; None if none is."""
    if not left.any():
        return None
    index = len(value) - 1 - int(np.where(left, value, -np.inf)[::-1].argmax())
    left[index] = False
    return index


def _read(completions: Completions, groups: Groups, index: int | None) -> TellingGroup | None:
    if index is None:
        return None
    step, group = int(groups.step[index]), int(groups.group[index])
    return TellingGroup(
        step=step,
        group=group,
        row=int(groups.row[index]),
        mean=float(groups.mean[index]),
        spread=float(groups.spread[index]),
        records=[one for one in completions.read(step) if one.get("group") == group],
    )
