"""The completions of a run by when they were sampled, and by their group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores


@dataclass(frozen=True)
class TimeBins:
    """C ranges of rollouts, all of them of as many as can be.

    first, last: ``[C]``, the steps of the first and of the last rollout of each. edges:
    ``[C + 1]``, the step at which each begins, and at which the last one ends.
    """

    first: np.ndarray
    last: np.ndarray
    edges: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def time_bins(step: np.ndarray, columns: int) -> tuple[TimeBins, np.ndarray]:
    """At most ``columns`` ranges of the rollouts of ``step`` ``[B]``, and each one's range
    ``[B]``."""
    rollouts, which = np.unique(step, return_inverse=True)
    count = min(columns, len(rollouts))
    of_rollout = np.arange(len(rollouts)) * count // max(len(rollouts), 1)
    begins = np.searchsorted(of_rollout, np.arange(count))
    ends = np.searchsorted(of_rollout, np.arange(count), side="right") - 1
    first, last = rollouts[begins], rollouts[ends]
    # A rollout is used until the next one is made.
    usual = np.median(np.diff(rollouts)) if len(rollouts) > 1 else 1.0
    edges = np.append(first, last[-1:] + usual).astype(float)
    return TimeBins(first, last, edges), of_rollout[which]


def _float32(reward: np.ndarray) -> np.ndarray:
    """Rewards as advantages are made from them: what float32 cannot tell apart is the same."""
    with np.errstate(over="ignore"):
        return reward.astype(np.float32)


@dataclass(frozen=True)
class Groups:
    """G groups of completions, by the order of their rollouts.

    step, group, row: ``[G]`` int64. scored: ``[G]``, how many of its completions have a reward.
    low, high, mean, spread: ``[G]`` of their rewards, NaN without any; the spread is the standard
    deviation, and where all have the same reward it is 0 and the mean is that reward, exactly. of:
    ``[B]``, the group of each completion.
    """

    step: np.ndarray
    group: np.ndarray
    row: np.ndarray
    scored: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    of: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @property
    def even(self) -> np.ndarray:
        """``[G]``: no completion has another reward than the others, by the rule of
        ``frac_reward_zero_std``."""
        return self.low == self.high


def groups_of(scores: Scores) -> Groups:
    """The groups of all rollouts."""
    return _gathered(scores, scores.group)


def visits_of(scores: Scores) -> Groups:
    """The same by prompt: all completions of a row in a rollout are one group."""
    return _gathered(scores, scores.row)


def _gathered(scores: Scores, member: np.ndarray) -> Groups:
    """One group for each pair of a step and a ``member`` ``[B]``."""
    _, rollout = np.unique(scores.step, return_inverse=True)
    names, name = np.unique(member, return_inverse=True)
    keys = rollout * max(len(names), 1) + name
    _, at, of = np.unique(keys, return_index=True, return_inverse=True)
    count = len(at)
    reward = _float32(scores.reward)
    has = np.isfinite(reward)
    values, owners = reward[has].astype(float), of[has]
    scored = np.bincount(owners, minlength=count)
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, owners, values)
    np.maximum.at(high, owners, values)
    known = scored > 0
    low, high = np.where(known, low, np.nan), np.where(known, high, np.nan)
    many = np.maximum(scored, 1)
    mean = np.bincount(owners, weights=values, minlength=count) / many
    # Exact where all are equal: float64 holds the sum of so many float32s.
    mean = np.where(known, mean, np.nan)
    squares = np.bincount(owners, weights=(values - mean[owners]) ** 2, minlength=count)
    return Groups(
        step=scores.step[at],
        group=scores.group[at],
        row=scores.row[at],
        scored=scored,
        low=low,
        high=high,
        mean=mean,
        spread=np.where(known, np.sqrt(squares / many), np.nan),
        of=of,
    )
