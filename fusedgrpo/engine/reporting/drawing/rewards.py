"""The plot of the rewards: the sum, each function by itself, and held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedgrpo.engine.reporting.drawing.curves import (
    View,
    draw_curve,
    thin_and_thick,
    view_of,
)
from fusedgrpo.engine.reporting.drawing.figure import (
    COLOURS,
    DASHES,
    INK,
    WIDTHS,
    Material,
    add_legend,
    legible,
    over_steps,
    plain,
)
from fusedgrpo.engine.reporting.looks.curves import trace
from fusedgrpo.engine.reporting.metrics_log import Row, reward_names
from fusedgrpo.engine.reporting.smoothing import most_of, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUM = "reward (weighted sum)"
UNIT = "mean reward"
READABLE = 4.0  # curves share an axis while the greatest is at most so many times the least
SAME = 1e-6  # of the greatest: values that differ by less are equal
HEIGHT = 2.2  # inches, of each further panel


@dataclass(frozen=True)
class Curve:
    """names: all that have these values. steps, values: ``[S]``, NaN where there is none. colour,
    dashes, width: of its line."""

    names: tuple[str, ...]
    steps: np.ndarray
    values: np.ndarray
    colour: str = INK
    dashes: Any = "-"
    width: float = WIDTHS[0]
    held_out: bool = False

    @property
    def size(self) -> float:
        return max(map(abs, most_of(self.values)))

    @property
    def constant(self) -> bool:
        """It has several values, which are one."""
        found = self.values[np.isfinite(self.values)]
        return len(found) > 1 and bool(np.ptp(found) <= SAME * np.abs(found).max())

    def same_as(self, other: Curve) -> bool:
        return np.array_equal(self.steps, other.steps) and bool(
            np.allclose(self.values, other.values, rtol=SAME, atol=SAME * self.size, equal_nan=True)
        )


def draw_rewards(figure: Figure, material: Material) -> bool:
    """One panel, or several above each other where rewards are of very different size."""
    panels = packed(reward_curves(material.rows))
    if not panels:
        return False
    figure.set_figheight(figure.get_figheight() + HEIGHT * (len(panels) - 1))
    count = max(len(curve.steps) for panel in panels for curve in panel if not curve.held_out)
    found = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    notes = []
    for axes, panel in zip(found, panels, strict=True):
        view = view_of(curve.values for curve in panel)
        for curve in panel:
            _draw(axes, curve, window_of(count), view)
        if view is not None:
            axes.set_ylim(view.low, view.high)
            notes.append(view.note_on_means)
        axes.set_ylabel(UNIT)
    steps = np.concatenate([curve.steps for panel in panels for curve in panel])
    over_steps(found[-1], steps)
    add_legend(figure, thin_and_thick(count), *notes)
    return True


def reward_curves(rows: Sequence[Row]) -> list[Curve]:
    """The sum first, equal ones once, each with a line of its own; held-out prompts last. None
    where there is only the latter."""
    keys = {SUM: "reward"} | {name: f"rewards/{name}/mean" for name in reward_names(rows)}
    found: list[Curve] = []
    for name, key in keys.items():
        curve = Curve((name,), *trace(rows, key))
        if not len(curve.steps):
            continue
        equal = next((i for i, other in enumerate(found) if curve.same_as(other)), None)
        if equal is None:
            found.append(curve)
        else:
            found[equal] = replace(found[equal], names=(*found[equal].names, name))
    styled = [
        replace(
            curve,
            colour=COLOURS[i % len(COLOURS)],
            dashes=DASHES[i % len(DASHES)],
            width=WIDTHS[min(i, len(WIDTHS) - 1)],
        )
        for i, curve in enumerate(found)
    ]
    held_out = Curve(("held-out prompts",), *trace(rows, "eval_reward"), held_out=True)
    return [*styled, held_out] if styled and len(held_out.steps) else styled


def packed(curves: Sequence[Curve]) -> list[list[Curve]]:
    """The curves of each panel: together while one can read them all."""
    panels: list[list[Curve]] = []
    for curve in curves:
        for panel in panels:
            if _readable([*panel, curve]):
                panel.append(curve)
                break
        else:
            panels.append([curve])
    return panels


def _readable(curves: Sequence[Curve]) -> bool:
    """A constant may be small beside others, but must not make them so."""
    sizes = [curve.size for curve in curves if not curve.constant and curve.size > 0]
    return not sizes or max(curve.size for curve in curves) <= READABLE * min(sizes)


def _draw(axes: Axes, curve: Curve, window: int, view: View | None) -> None:
    if curve.held_out:
        axes.plot(
            curve.steps, curve.values, "D--", color=INK, markersize=5, label=legible(*curve.names)
        )
    elif curve.constant:
        # Under the others and thin, or it would hide one that reaches it.
        value = float(curve.values[np.isfinite(curve.values)][0])
        axes.plot(
            curve.steps,
            curve.values,
            color=curve.colour,
            linewidth=1.2,
            linestyle=curve.dashes if curve.dashes != "-" else DASHES[-1],
            zorder=1.5,
            label=f"{legible(*curve.names)}: always {plain(value)}",
        )
    else:
        draw_curve(
            axes,
            curve.steps,
            curve.values,
            colour=curve.colour,
            names=curve.names,
            dashes=curve.dashes,
            width=curve.width,
            window=window,
            view=view,
        )
