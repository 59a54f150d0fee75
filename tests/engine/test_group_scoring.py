"""GroupScoring: groups are scored one after another, and nobody waits who need not."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fusedgrpo.engine.group_scoring import GroupScoring
from fusedgrpo.engine.rollout.types import Group

GROUPS = [Group(i, (i,), ()) for i in range(3)]


class Work:
    """A scoring that is over when somebody says so."""

    def __init__(self, place: int):
        self.place = place
        self.over = False


def scoring(failing: list[int] | None = None) -> tuple[GroupScoring, list[Work], list[int]]:
    """With what was begun, and what was finished."""
    begun: list[Work] = []
    finished: list[int] = []

    def begin(place: int, group: Group) -> Any:
        assert group is GROUPS[place]
        begun.append(Work(place))
        return begun[-1]

    def teaches(place: int, group: Group, work: Any) -> bool:
        assert work is begun[-1] and work.place == place and group is GROUPS[place]
        if failing and place in failing:
            failing.remove(place)
            raise MemoryError
        finished.append(place)
        return place != 1

    return GroupScoring(begin, cast("Any", teaches)), begun, finished


def test_one_after_another_and_nobody_waits() -> None:
    groups, begun, finished = scoring()
    verdicts = [groups(place, GROUPS[place]) for place in range(3)]
    assert [verdict(False) for verdict in verdicts] == [None] * 3
    assert [work.place for work in begun] == [0] and not finished
    begun[0].over = True
    assert [verdict(False) for verdict in verdicts] == [True, None, None]
    assert [work.place for work in begun] == [0, 1] and finished == [0]
    assert verdicts[0](False) is True  # asked again


def test_whoever_waits_waits_for_those_before() -> None:
    groups, begun, finished = scoring()
    verdicts = [groups(place, GROUPS[place]) for place in range(3)]
    assert verdicts[1](True) is False and finished == [0, 1]
    assert verdicts[2](False) is None and [work.place for work in begun] == [0, 1, 2]
    assert [verdict(True) for verdict in verdicts] == [True, False, True]
    assert finished == [0, 1, 2]


def test_what_failed_is_scored_again() -> None:
    groups, begun, finished = scoring(failing=[1])
    verdicts = [groups(place, GROUPS[place]) for place in range(3)]
    with pytest.raises(MemoryError):
        verdicts[1](True)
    assert [verdict(True) for verdict in verdicts] == [True, False, True]
    assert [work.place for work in begun] == [0, 1, 1, 2] and finished == [0, 1, 2]
