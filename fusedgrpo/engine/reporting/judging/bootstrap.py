"""How sure a change of a reward in training is, from the completions behind it.

A prompt is drawn with all its completions of both windows, so that one which both have is compared
with itself, and how hard it is cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.judging.changes import CONFIDENCE, RESAMPLES, Z, quantile

PROMPTS = 10  # of a window, fewer say too little of others
AT_ONCE = 2**20  # prompts that are drawn at a time, in 24 MB


def margin_over_prompts(
    scores: Scores, values: np.ndarray, first: Sequence[int], last: Sequence[int]
) -> tuple[float, int] | None:
    """Half the width of the interval of the change of ``values`` ``[B]``, which go with ``scores``,
    between the rollouts of the steps ``first`` and those of ``last``; and the number of prompts.
    None where a rollout has no scores, or a window fewer than 10 prompts.
    """
    known = np.isfinite(values)
    windows = [known & np.isin(scores.step, steps) for steps in (first, last)]
    for window, steps in zip(windows, (first, last), strict=True):
        if len(np.unique(scores.step[window])) < len(steps):
            return None
    either = windows[0] | windows[1]
    rows, prompt = np.unique(scores.row[either], return_inverse=True)
    values, step, ends = values[either], scores.step[either], windows[1][either]
    sums, counts = _by_prompt(prompt, values, ends, len(rows))
    prompts = int((counts > 0).sum(axis=0).min())
    if prompts < PROMPTS:
        return None
    # Percentiles of means of n values are those of a normal variable with a variance of n - 1 of
    # them: too narrow for few (Hesterberg 2015, arXiv 1411.5279).
    wider = quantile(prompts - 1) / Z * math.sqrt(prompts / (prompts - 1))
    resampled = wider * _resampled(sums, counts)
    # Completions of a step share its policy, which other prompts would have met as well: drawing
    # prompts cannot see how much it swings from step to step, and the more completions there are,
    # the surer a swing would look. So what step means scatter beyond their prompts is added.
    drift = _drift(step, prompt, values, ends, sums, counts)
    window = len(first)
    swing = quantile(2 * (window - 1)) * math.sqrt(2 * drift / window)
    return math.hypot(resampled, swing), len(rows)


def _by_prompt(
    prompt: np.ndarray, values: np.ndarray, ends: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values and numbers of them, ``[P, 2]``: in the first window, in the last."""
    cell = 2 * prompt + ends
    sums = np.bincount(cell, weights=values, minlength=2 * count)
    counts = np.bincount(cell, minlength=2 * count)
    return sums.reshape(count, 2), counts.reshape(count, 2).astype(float)


def _resampled(sums: np.ndarray, counts: np.ndarray) -> float:
    """Half the width of the percentile interval of the difference of the windows' means."""
    generator = np.random.default_rng(0)
    count = len(sums)
    table = np.concatenate([sums, counts], axis=1)
    changes = []
    at_once = max(1, AT_ONCE // count)
    for start in range(0, RESAMPLES, at_once):
        samples = min(at_once, RESAMPLES - start)
        drawn = generator.integers(0, count, (samples, count))
        drawn += count * np.arange(samples)[:, None]
        times = np.bincount(drawn.reshape(-1), minlength=samples * count)
        totals = times.reshape(samples, count).astype(float) @ table
        with np.errstate(invalid="ignore"):  # a draw may miss all prompts of a window
            means = totals[:, :2] / totals[:, 2:]
        changes.append(means[:, 1] - means[:, 0])
    found = np.concatenate(changes)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(high - low) / 2


def _drift(
    step: np.ndarray,
    prompt: np.ndarray,
    values: np.ndarray,
    ends: np.ndarray,
    sums: np.ndarray,
    counts: np.ndarray,
) -> float:
    """The variance of what all prompts of a step have in common, by which step means scatter more
    than prompts within steps explain; 0 where they explain it.

    Each prompt is compared with itself in the other window, where it is there, else with the others
    of its window.
    """
    places, cell = np.unique(np.stack([step, prompt, ends]), axis=1, return_inverse=True)
    cell = cell.reshape(-1)
    size = np.bincount(cell)
    mean = np.bincount(cell, weights=values) / size
    at, who, late = places
    other = 1 - late
    paired = counts[who, other] > 0
    left = mean - np.where(paired, sums[who, other] / np.maximum(counts[who, other], 1), 0.0)
    excess = []
    for window in (0, 1):
        here = late == window
        for kind in (here & paired, here & ~paired):
            if kind.any():
                left[kind] -= left[kind].mean()
        _, group = np.unique(at[here], return_inverse=True)
        prompts = np.bincount(group)
        means = np.bincount(group, weights=left[here]) / prompts
        freedom = int((prompts - 1).sum())
        within = ((left[here] - means[group]) ** 2).sum() / freedom if freedom else 0.0
        excess.append(means.var(ddof=1) - within * (1 / prompts).mean())
    return max(0.0, float(np.mean(excess)))
