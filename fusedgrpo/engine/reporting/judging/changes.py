"""A noisy series at its beginning and at its end: by how much it changed, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

CONFIDENCE = 0.99  # of every interval here: a run has many figures, and each could look like news
Z = 2.5758  # of the normal distribution, two-sided, at that confidence
_MEDIAN = 0.6745  # of the absolute value of a normal variable, in standard deviations
RESAMPLES = 4000
FEWEST = 10  # values of a training series
EVALUATIONS = 5  # from this many on their own scatter says how noisy they are
TURNING = 7  # from this many on, what a line with a turn leaves of it
PROMPTS = 32  # what an evaluation is taken to have where nothing says how many prompts it had


@dataclass(frozen=True, slots=True)
class Change:
    """A series as it was and as it became.

    first, last: means of its first and last values; begins, ends: the steps of these, each
    ``(from, to)``. margin: half the width of the interval of ``last - first``. best, best_step:
    the greatest mean of as many values, and the last step of them; fell_back: it is above the end
    by more than chance. prompts: how many were compared, where that is known.
    """

    first: float
    last: float
    begins: tuple[int, int]
    ends: tuple[int, int]
    margin: float
    best: float
    best_step: int
    fell_back: bool
    prompts: int | None = None

    @property
    def size(self) -> float:
        return self.last - self.first

    @property
    def rose(self) -> bool:
        return self.size > self.margin

    @property
    def fell(self) -> bool:
        return -self.size > self.margin

    @property
    def slight(self) -> bool:
        """Sure or not, it is less than a twentieth of what the series is about."""
        return abs(self.size) < 0.05 * max(abs(self.first), abs(self.last))

    @property
    def share_left(self) -> float:
        """The end as a share of the beginning; 1 where that was not above 0."""
        return self.last / self.first if self.first > 0 else 1.0

    def turned(self) -> Change:
        """The same of a quantity of which less is better: everything with its sign changed."""
        return Change(
            *(-self.first, -self.last, self.begins, self.ends, self.margin),
            *(-self.last, self.ends[1], False, self.prompts),
        )


def of_training(steps: Sequence[int], values: Sequence[float]) -> Change | None:
    """First against last fifth, at least 5 values each; None for fewer than 10 values.

    The noise of a value is the greater of two estimates: from the spread inside the two windows,
    where a slope counts as noise, and from the differences of neighbours, where it does not.
    """
    count = len(values)
    if count < FEWEST:
        return None
    window = window_of(count)
    first, last = values[:window], values[-window:]
    inside = (np.var(first, ddof=1) + np.var(last, ddof=1)) / 2
    noise = max(float(inside), float((np.diff(values) ** 2).mean()) / 2)
    margin = quantile(2 * (window - 1)) * math.sqrt(2 * noise / window)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    means = (sums[window:] - sums[:-window]) / window
    top = int(means.argmax())
    change = Change(
        first=fmean(first),
        last=fmean(last),
        begins=(steps[0], steps[window - 1]),
        ends=(steps[-window], steps[-1]),
        margin=max(margin, least(values)),
        best=float(means[top]),
        best_step=steps[top + window - 1],
        fell_back=False,
    )
    # The best of many windows is above the others by chance alone.
    return _with_fall(change, 1.4 * change.margin)


def window_of(count: int) -> int:
    """How many of so many values of a training series its beginning and its end are."""
    return max(FEWEST // 2, count // 5)


def of_evaluations(
    steps: Sequence[int],
    values: Sequence[float],
    spread: float | None = None,
    prompts: Mapping[int, Mapping[int, float]] | None = None,
) -> Change | None:
    """The first evaluation against the last one, or the mean of the last fifth of many; None for
    fewer than two.

    prompts: by step the value of each held-out prompt. Where the first and the last evaluation have
    them, the interval is from 4,000 resamplings of the prompts that both have, of their
    differences. spread: else, the standard deviation of a value within an evaluation.
    """
    count = len(values)
    if count < 2:
        return None
    many = max(1, count // EVALUATIONS)
    first, last = values[0], fmean(values[-many:])
    top = max(range(count), key=lambda i: values[i])
    paired = _differences(steps, prompts) if prompts else None
    if paired is not None:
        first, last, many = paired[:, 0].mean(), paired[:, 1].mean(), 1
        margin = bootstrapped(paired[:, 1] - paired[:, 0])
    elif count >= EVALUATIONS:
        noise, freedom = _scatter(np.asarray(values, dtype=float))
        margin = quantile(freedom) * noise * math.sqrt(1 + 1 / many)
        if count < TURNING and spread:  # few values may agree by chance
            margin = max(margin, 0.25 * Z * spread * math.sqrt(2 / PROMPTS))
    else:
        each = spread if spread else 0.5 * max(abs(v) for v in values)
        margin = Z * each * math.sqrt(2 / PROMPTS)
    change = Change(
        first=float(first),
        last=float(last),
        begins=(steps[0], steps[0]),
        ends=(steps[-many], steps[-1]),
        margin=max(float(margin), least(values)),
        best=values[top],
        best_step=steps[top],
        fell_back=False,
        prompts=None if paired is None else len(paired),
    )
    return _with_fall(change, 1.2 * change.margin)


def _scatter(values: np.ndarray) -> tuple[float, int]:
    """The standard deviation of values about a curve that nobody knows, and its degrees of freedom.

    Few values: from the median of their bends (second differences), which are noise but where the
    curve turns. More: what the best line with one turn leaves, since such a curve has many bends.
    """
    count = len(values)
    if count < TURNING:
        bends = np.abs(np.diff(values, n=2))
        return float(np.median(bends)) / (_MEDIAN * math.sqrt(6)), count - 2
    time = np.arange(count, dtype=float)
    left = []
    for knot in range(1, count - 1):
        line = np.stack([np.ones(count), time, np.maximum(time - knot, 0)], axis=1)
        fit = np.linalg.lstsq(line, values, rcond=None)[0]
        left.append(float(((values - line @ fit) ** 2).sum()))
    return math.sqrt(min(left) / (count - 4)), count - 4


def quantile(freedom: int) -> float:
    """Student's t at ``CONFIDENCE``, two-sided, by the expansion in 1 / freedom (Abramowitz and
    Stegun 26.7.5)."""
    z, freedom = Z, max(freedom, 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def least(values: Sequence[float]) -> float:
    """A change below this is none, however sure: a hundredth of what the values are about."""
    return 0.01 * max(abs(v) for v in values)


def is_share(values: Sequence[float]) -> bool:
    """Whether means of a reward look like shares of right answers, of which 1 is all."""
    return max(values) <= 1.05 and min(values) >= -0.5


def _with_fall(change: Change, margin: float) -> Change:
    below = change.best - change.last
    gained = change.best - change.first
    return replace(change, fell_back=below > margin and below > 0.25 * gained)


def _differences(
    steps: Sequence[int], prompts: Mapping[int, Mapping[int, float]]
) -> np.ndarray | None:
    """``[P, 2]``: each prompt in the first and in the last evaluation; None where they do not have
    two in common."""
    if steps[0] not in prompts or steps[-1] not in prompts:
        return None
    before, after = prompts[steps[0]], prompts[steps[-1]]
    both = sorted(before.keys() & after.keys())
    if len(both) < 2:
        return None
    return np.asarray([(before[row], after[row]) for row in both], dtype=float).reshape(-1, 2)


def bootstrapped(differences: np.ndarray) -> float:
    """Half the width of the percentile interval of their mean, over resampled prompts."""
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(differences), (RESAMPLES, len(differences)))
    means = differences[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(high - low) / 2
