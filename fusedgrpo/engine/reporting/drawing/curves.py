"""Curves over steps: thin as they were logged, thick as the mean of their neighbourhood."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedgrpo.engine.reporting.drawing.figure import legible, plain
from fusedgrpo.engine.reporting.smoothing import MARGIN, far_out, most_of, smooth, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MANY = 1000  # values, from which on single ones are finer than a pixel
BANDS = 300  # ranges that a band of so many values is drawn from
FLAT = 1e-6  # of the greatest: a range of so much is rounding


def draw_curve(
    axes: Axes,
    steps: np.ndarray,
    values: np.ndarray,
    *,
    colour: str,
    names: Sequence[str],
    dashes: Any = "-",
    width: float = 2.0,
    window: int | None = None,
    view: View | None = None,
) -> None:
    """Draw one metric, both ways. NaN is a gap, and a value between two gaps a dot. names: in the
    legend, of all that has these values. window: see ``smooth``. view: what is beyond it is left
    out of the thick curve."""
    beyond = None if view is None else (values < view.low) | (values > view.high)
    there = np.concatenate([[False], np.isfinite(values), [False]])
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    if len(values) > MANY:
        axes.fill_between(*_band(steps, values), color=colour, alpha=0.25, linewidth=0)
    else:
        axes.plot(steps, values, color=colour, alpha=0.35, linewidth=0.9)
    axes.plot(
        steps, smooth(values, window, beyond), color=colour, linewidth=width, linestyle=dashes,
        marker="o" if alone.any() else "", markevery=np.flatnonzero(alone).tolist(),
        markersize=2 * width, label=legible(*names),
    )  # fmt: skip


def _band(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, least and greatest of each of ``BANDS`` ranges; NaN where a range has no value."""
    begins = np.arange(BANDS) * len(values) // BANDS
    low = np.fmin.reduceat(values, begins)
    high = np.fmax.reduceat(values, begins)
    return steps[begins + _per_band(len(values)) // 2], low, high


def _per_band(count: int) -> int:
    return count // BANDS


def thin_and_thick(count: int) -> str:
    """A legend's note: what is thin and what is thick in curves of ``count`` values."""
    if count < 2:
        return ""
    thick = f"thick: mean over {window_of(count)} steps"
    if count > MANY:
        return f"pale: least to greatest of {_per_band(count)} steps; {thick}"
    return f"thin: each step; {thick}"


@dataclass(frozen=True)
class View:
    """A y axis from low to high, and what to say of values that it leaves out."""

    low: float
    high: float
    note: str

    @property
    def note_on_means(self) -> str:
        """The same where curves are drawn."""
        return f"{self.note} (in no mean)" if self.note else ""


def view_of(curves: Iterable[np.ndarray]) -> View | None:
    """The view that leaves out what is far from the rest of its curve, so that the others are more
    than one line, and that shows no rounding; None where matplotlib's own is good."""
    drawn = list(curves)
    every = np.concatenate(drawn)
    every = every[np.isfinite(every)]
    ranges = [most_of(values) for values in drawn]
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
    size = max(abs(low), abs(high))
    if size > 0 and high - low <= FLAT * size:
        margin = 0.05 * size
    elif low <= every.min() and every.max() <= high:
        return None
    else:
        margin = MARGIN * (high - low)
    outside = every[far_out(every, low, high)]
    low, high = low - margin, high + margin
    if not len(outside):
        return View(low, high, "")
    far = plain(float(outside[np.abs(outside).argmax()]))
    return View(low, high, f"{len(outside)} beyond the picture, the furthest {far}")
