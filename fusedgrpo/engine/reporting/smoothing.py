"""The moving mean that curves of a run are drawn with, and which values are no part of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FAR = 8.0  # a range so many times that of most values is theirs and that of a few far out
MARGIN = 0.25  # of the range of most values: so far beyond it is not yet far out


def window_of(count: int) -> int:
    """How many values ``smooth`` takes the mean of, in the midst of ``count``: about a tenth of
    them, an odd number, 3 at least."""
    return 2 * max(1, count // 20) + 1


def smooth(
    values: Sequence[float] | np.ndarray,
    window: int | None = None,
    left_out: np.ndarray | None = None,
) -> list[float]:
    """The centred moving mean over ``window`` values (``window_of``), fewer at the ends.

    NaN stays NaN and counts in no mean; what is ``left_out`` (bool, of the same shape) counts in
    none either, but the mean goes on there.
    """
    found = np.asarray(values, dtype=float)
    half = (window or window_of(len(found))) // 2
    there = np.isfinite(found)
    counted = there if left_out is None else there & ~left_out
    if not counted.any():
        return [float("nan")] * len(found)
    ones = np.ones(2 * half + 1)
    # Each window is summed by itself: in differences of running sums one huge value would take
    # the digits of all that come after it.
    inside = slice(half, half + len(found))
    sums = np.convolve(np.where(counted, found, 0.0), ones)[inside]
    counts = np.convolve(counted.astype(float), ones)[inside]
    known = there & (counts > 0.5)
    return np.where(known, sums / np.maximum(counts, 1.0), np.nan).tolist()


def most_of(values: np.ndarray) -> tuple[float, float]:
    """The range of the finite ``values``, one at least, without the outermost 2 %, one on each side
    at least, where those are far out."""
    found = np.sort(values[np.isfinite(values)])
    out = max(1, len(found) // 50)
    if len(found) >= 10:
        inner = found[out:-out]
        span = inner[-1] - inner[0]
        if 0 < span * FAR < found[-1] - found[0]:
            return float(inner[0]), float(inner[-1])
    return float(found[0]), float(found[-1])


def far_out(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Which values are further from low to high, the range of most, than a margin around it."""
    margin = MARGIN * (high - low)
    return (values < low - margin) | (values > high + margin)
