"""Does it pay to be long?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.looks.tables import TimeBins, groups_of, time_bins

MOST_POINTS = 400
FIFTHS = 5  # the first and the last of which are compared


@dataclass(frozen=True)
class Cloud:
    """Completions of some rollouts.

    first, last: steps of the first and last rollout. length, reward: ``[P]``, P at most 400 of
    them, evenly thinned, in tokens and float64. count: completions with a reward. correlation:
    Pearson's, of all of these; None where one of both is constant.
    """

    first: int
    last: int
    length: np.ndarray
    reward: np.ndarray
    count: int
    correlation: float | None


@dataclass(frozen=True)
class LengthAgainstReward:
    """early, late: the first and the last fifth of the rollouts, one at least; None where no
    completion has a reward, and late also where there is only one rollout. time: the ranges of
    rollouts. above, below: ``[C]`` tokens, the mean length of the completions whose reward is above
    and below the mean of their group; NaN where there are none."""

    early: Cloud | None
    late: Cloud | None
    time: TimeBins
    above: np.ndarray
    below: np.ndarray


def length_against_reward(scores: Scores, columns: int = 60) -> LengthAgainstReward:
    """Length and reward of single completions, and in their groups over at most ``columns`` ranges
    of rollouts."""
    rollouts = np.unique(scores.step)
    fifth = max(1, len(rollouts) // FIFTHS)
    time, column = time_bins(scores.step, columns)
    groups = groups_of(scores)
    # A little, so that rounding is neither above nor below.
    beyond = (scores.reward - groups.mean[groups.of]) / (groups.high - groups.low + 1e-30)[
        groups.of
    ]

    def mean_length(which: np.ndarray) -> np.ndarray:
        count = np.bincount(column[which], minlength=len(time))
        total = np.bincount(column[which], weights=scores.length[which], minlength=len(time))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    divided = (groups.low < groups.high)[groups.of]
    return LengthAgainstReward(
        early=_cloud(scores, rollouts[:fifth]),
        late=_cloud(scores, rollouts[-fifth:]) if len(rollouts) > 1 else None,
        time=time,
        above=mean_length(divided & (beyond > 1e-6)),
        below=mean_length(divided & (beyond < -1e-6)),
    )


def _cloud(scores: Scores, rollouts: np.ndarray) -> Cloud | None:
    if not len(rollouts):
        return None
    first, last = rollouts[0], rollouts[-1]
    which = (scores.step >= first) & (scores.step <= last) & np.isfinite(scores.reward)
    length, reward = scores.length[which], scores.reward[which]
    if not len(length):
        return None
    kept = np.linspace(0, len(length) - 1, min(len(length), MOST_POINTS)).round().astype(int)
    return Cloud(
        first=int(first),
        last=int(last),
        length=length[kept],
        reward=reward[kept],
        count=len(length),
        correlation=_correlation(length.astype(float), reward),
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
