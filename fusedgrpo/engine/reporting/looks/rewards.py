"""How rewards are spread over a run, and how many groups there was something to learn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.judging.prompts import best_reward, is_solved
from fusedgrpo.engine.reporting.looks.tables import TimeBins, groups_of, time_bins

FEW_VALUES = 12  # rewards of so many values at most have a bin for each
SAME = 1e-6  # of them, and of what is usual: rewards that differ by less are one value
FAR = 4.0  # a range so many times that of the middle 98 % is cut to it


@dataclass(frozen=True)
class RewardHistogram:
    """Rewards by time, R bins of rewards by C of time.

    time: the ranges of rollouts. edges: ``[R + 1]``, ascending. values: ``[R]``, the one reward of
    each bin where there are at most 12 different ones, else None. counts: ``[R, C]`` int64,
    completions; the outer bins hold what lies beyond their edges, too. shares: ``[R, C]``, of the
    completions of a column that have a reward; 0 without any. unscored: ``[C]``, completions
    without a reward. least, greatest: reward of the run, None without any.
    """

    time: TimeBins
    edges: np.ndarray
    values: np.ndarray | None
    counts: np.ndarray
    shares: np.ndarray
    unscored: np.ndarray
    least: float | None
    greatest: float | None


def reward_histogram(scores: Scores, columns: int = 60, bins: int = 20) -> RewardHistogram:
    """The rewards of at most ``columns`` ranges of rollouts, in ``bins`` of equal width."""
    time, column = time_bins(scores.step, columns)
    has = np.isfinite(scores.reward)
    rewards = scores.reward[has]
    values = _few_values(rewards)
    if values is not None:
        edges = _around(values)
    else:
        edges = np.linspace(*_middle(rewards), bins + 1)
    count = len(edges) - 1
    row = np.clip(np.searchsorted(edges, rewards, side="right") - 1, 0, max(count - 1, 0))
    cells = np.bincount(row * len(time) + column[has], minlength=count * len(time))
    counts = cells.reshape(count, len(time))
    return RewardHistogram(
        time=time,
        edges=edges,
        values=values,
        counts=counts,
        shares=counts / np.maximum(counts.sum(axis=0), 1),
        unscored=np.bincount(column[~has], minlength=len(time)),
        least=float(rewards.min()) if len(rewards) else None,
        greatest=float(rewards.max()) if len(rewards) else None,
    )


def _few_values(rewards: np.ndarray) -> np.ndarray | None:
    """The different rewards if there are few, the least of those that are as good as the same."""
    found = np.unique(rewards)
    if not len(found):
        return found
    sizes = np.abs(found)
    usual = np.median(sizes[sizes > 0]) if sizes.any() else 0.0
    apart = np.diff(found) > SAME * np.maximum(np.maximum(sizes[1:], sizes[:-1]), usual)
    values = found[np.concatenate([[True], apart])]
    return values if len(values) <= FEW_VALUES else None


def _around(values: np.ndarray) -> np.ndarray:
    """Edges half-way between values, and as far beyond the outer ones."""
    if not len(values):
        return np.zeros(1)
    if len(values) == 1:
        return values[0] + np.asarray([-0.5, 0.5])
    between = (values[1:] + values[:-1]) / 2
    return np.concatenate([[2 * values[0] - between[0]], between, [2 * values[-1] - between[-1]]])


def _middle(rewards: np.ndarray) -> tuple[float, float]:
    """The range of the rewards, without a few that are so far out that the others would be one."""
    least, low, high, greatest = np.quantile(rewards, [0, 0.01, 0.99, 1])
    if low < high and greatest - least > FAR * (high - low):
        return float(low), float(high)
    return float(least), float(greatest)


@dataclass(frozen=True)
class GroupSignal:
    """Shares ``[C]`` of the groups of each range of rollouts; together 1.

    solved: every completion has the greatest reward of the run. divided: rewards differ within the
    group, so there is an advantage. same: all rewards are one, below the greatest. unscored: no
    completion has a reward. groups: ``[C]`` int64, how many. top: the greatest reward, None where
    none is above 0, and then nothing is solved.
    """

    time: TimeBins
    solved: np.ndarray
    divided: np.ndarray
    same: np.ndarray
    unscored: np.ndarray
    groups: np.ndarray
    top: float | None


def group_signal(scores: Scores, columns: int = 60) -> GroupSignal:
    """How many groups there was something to learn from. Rewards are compared in float32, as they
    are where advantages are made; ``solved + same`` is ``frac_reward_zero_std`` where groups are of
    one size."""
    groups = groups_of(scores)
    time, column = time_bins(groups.step, columns)
    top = best_reward(groups.high.tolist())
    solved = is_solved(groups.low, top)
    count = np.bincount(column, minlength=len(time))

    def share(which: np.ndarray) -> np.ndarray:
        return np.bincount(column[which], minlength=len(time)) / np.maximum(count, 1)

    return GroupSignal(
        time=time,
        solved=share(solved),
        divided=share(groups.low < groups.high),
        same=share(groups.even & ~solved),
        unscored=share(groups.scored == 0),
        groups=count,
        top=top,
    )
