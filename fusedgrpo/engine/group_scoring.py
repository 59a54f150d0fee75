"""Groups that are scored one after another, while others are decoded."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable

from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.engine.rewards.scorers import Scoring
from fusedgrpo.engine.rollout.types import Group, Verdict


class GroupScoring:
    """Says of each group whether it teaches anything, once it is scored. Reward functions in worker
    processes are not waited for; those of this process are called when they are asked about.

    begin: has a group scored, by its place in the rollout. teaches: whether one does, of its place,
    itself and its scoring, which it finishes.
    """

    def __init__(
        self,
        begin: Callable[[int, Group], Scoring[RewardBatch]],
        teaches: Callable[[int, Group, Scoring[RewardBatch]], bool],
    ):
        self._begin = begin
        self._teaches = teaches
        self._waiting: deque[tuple[int, Group]] = deque()
        self._current: Scoring[RewardBatch] | None = None  # of the first that waits
        self._known: dict[int, bool] = {}

    def __call__(self, place: int, group: Group) -> Verdict:
        """The verdict on ``group``, to be asked for."""
        self._waiting.append((place, group))
        return functools.partial(self._verdict, place)

    def _verdict(self, place: int, wait: bool) -> bool | None:
        while place not in self._known:
            first, group = self._waiting[0]
            scoring = self._current or self._begin(first, group)
            self._current = scoring
            if not (wait or scoring.over):
                return None
            self._current = None  # where it fails, it is scored again if that is asked for
            self._known[first] = self._teaches(first, group, scoring)
            self._waiting.popleft()
        return self._known[place]
