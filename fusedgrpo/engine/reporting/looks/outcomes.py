"""The outcome of training for prompts that it met more than once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.judging.prompts import (
    Status,
    best_reward,
    counted,
    place,
    status_of,
)
from fusedgrpo.engine.reporting.looks.tables import visits_of

HALF: tuple[Status, ...] = ("better", "same", "worse")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A prompt. row: of the data. before, after: the mean reward of its completions in the first
    and in the last rollout that it is in, whose steps are first and last."""

    row: int
    status: Status
    first: int
    last: int
    before: float
    after: float


@dataclass(frozen=True)
class PromptOutcomes:
    """Prompts of at least two rollouts. A prompt is solved where every completion has the greatest
    reward of the run, top (None where that is not above 0), and never was where none got more than
    0 and the mean is what it was.

    counts: by status, in the order of ``judging.prompts.ORDER``, without zeros. half: how many were
    neither solved nor never, both times. prompts: all of them. changed: those whose mean is another
    than before, a loss before a gain, a great one before a small one. A mean of few samples is
    seldom twice the same: newly solved and lost say more than better and worse.
    """

    prompts: int
    counts: dict[Status, int]
    changed: tuple[Outcome, ...]
    top: float | None

    @property
    def half(self) -> int:
        return sum(self.counts.get(status, 0) for status in HALF)


def prompt_outcomes(scores: Scores) -> PromptOutcomes:
    """The first against the last time of each prompt, by the statuses of held-out prompts."""
    visits = visits_of(scores)
    known = visits.scored > 0
    top = best_reward(visits.high.tolist())
    row, step, mean = visits.row[known], visits.step[known], visits.mean[known]
    order = np.lexsort([step, row])
    row, step, mean = row[order], step[order], mean[order]
    new = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
    ends = np.append(new[1:], len(row)) - 1
    found = []
    for i, j in zip(new[new < ends].tolist(), ends[new < ends].tolist(), strict=True):
        before, after = float(mean[i]), float(mean[j])
        status = status_of(before, after, top)
        found.append(Outcome(int(row[i]), status, int(step[i]), int(step[j]), before, after))
    changed = [one for one in found if one.before != one.after]
    return PromptOutcomes(
        prompts=len(found),
        counts=counted(one.status for one in found),
        changed=tuple(sorted(changed, key=lambda one: place(one.status, one.after - one.before))),
        top=top,
    )
