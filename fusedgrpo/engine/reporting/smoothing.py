"""The moving mean that curves of a run are drawn with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def window_of(count: int) -> int:
    """How many values ``smooth`` takes the mean of, in the midst of ``count``: about a tenth of
    them, an odd number, 3 at least."""
    return 2 * max(1, count // 20) + 1


def smooth(values: Sequence[float] | np.ndarray, window: int | None = None) -> list[float]:
    """The centred moving mean over ``window`` values (``window_of``), fewer at the ends.

    NaN stays NaN and counts in no mean.
    """
    found = np.asarray(values, dtype=float)
    half = (window or window_of(len(found))) // 2
    there = np.isfinite(found)
    if not there.any():
        return [float("nan")] * len(found)
    ones = np.ones(2 * half + 1)
    # Each window is summed by itself: in differences of running sums one huge value would take
    # the digits of all that come after it.
    inside = slice(half, half + len(found))
    sums = np.convolve(np.where(there, found, 0.0), ones)[inside]
    counts = np.convolve(there.astype(float), ones)[inside]
    return np.where(there, sums / np.maximum(counts, 1.0), np.nan).tolist()
