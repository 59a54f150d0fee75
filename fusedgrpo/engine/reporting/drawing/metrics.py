"""The plots of metrics other than rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fusedgrpo.engine.reporting.drawing.curves import draw_curve, thin_and_thick, view_of
from fusedgrpo.engine.reporting.drawing.figure import (
    COLOURS,
    DASHES,
    INK,
    MAP,
    PALE,
    Material,
    add_legend,
    over_steps,
    plain,
)
from fusedgrpo.engine.reporting.formatting import percent
from fusedgrpo.engine.reporting.looks.curves import (
    PHASES,
    clipping,
    gradient,
    kl_against_reward,
    memory_split,
    time_split,
    trace,
)
from fusedgrpo.engine.reporting.metrics_log import series
from fusedgrpo.engine.reporting.smoothing import smooth, window_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Figure", Material], bool]

PHASE_COLOURS = (COLOURS[0], COLOURS[5], COLOURS[4])  # apart in grey too
FAR_LIMIT = 3.0  # a limit so many times the top of the picture is not drawn into it


def single(key: str, unit: str, colour: str) -> Draw:
    """A plot of one metric."""

    def draw(figure: Figure, material: Material) -> bool:
        steps, values = trace(material.rows, key)
        if not len(steps):
            return False
        axes = figure.add_subplot()
        beyond = _draw_alone(axes, steps, values, colour, key)
        axes.set_ylabel(unit)
        over_steps(axes, steps)
        add_legend(figure, thin_and_thick(len(steps)), beyond)
        return True

    return draw


def _draw_alone(axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, name: str) -> str:
    """Draw the only curve of ``axes``; returns what to say of values that are far out."""
    view = view_of([values])
    draw_curve(axes, steps, values, colour=colour, names=[name], view=view)
    if view is None:
        return ""
    axes.set_ylim(view.low, view.high)
    return view.note_on_means


def draw_lengths(figure: Figure, material: Material) -> bool:
    """The mean, what lies between the least and the greatest, and how many were cut off."""
    steps, mean = trace(material.rows, "completions/mean_length")
    if not len(steps):
        return False
    axes = figure.add_subplot()
    draw_curve(axes, steps, mean, colour=COLOURS[0], names=["mean"])
    low_steps, low = trace(material.rows, "completions/min_length")
    high_steps, high = trace(material.rows, "completions/max_length")
    if len(low_steps) and np.array_equal(low_steps, high_steps):
        axes.fill_between(
            low_steps, low, high, color=COLOURS[0], alpha=0.12, linewidth=0,
            label="shortest to longest",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens")
    over_steps(axes, steps)
    cut_steps, cut = trace(material.rows, "completions/clipped_ratio")
    if len(cut_steps):
        colour = COLOURS[1]
        right = axes.twinx()
        right.plot(
            cut_steps, 100 * np.asarray(smooth(cut)), color=colour, linestyle=DASHES[2],
            marker="o" if len(cut_steps) == 1 else "", label="cut off by the limit (right)",
        )  # fmt: skip
        right.set(ylabel="share of completions (%)", ylim=(0, 105))
        right.yaxis.label.set_color(colour)
        right.tick_params(axis="y", colors=colour)
        right.grid(False)
    add_legend(figure, thin_and_thick(len(steps)))
    return True


def draw_time(figure: Figure, material: Material) -> bool:
    """The phases of a step above each other."""
    rows = [row for row in material.rows if series([row], "time/update")[0]]
    if not rows:
        return False
    steps = np.asarray([row["step"] for row in rows], dtype=float)
    split = time_split(rows)
    seconds = [smooth([row.get(f"time/{phase}") or 0.0 for row in rows]) for phase in split.phases]
    axes = figure.add_subplot()
    over_steps(axes, steps)
    if len(steps) == 1:  # an area needs two points
        steps = np.asarray([steps[0] - 0.3, steps[0] + 0.3])
        seconds = [values * 2 for values in seconds]
    axes.stackplot(
        steps,
        *seconds,
        labels=[f"{p} ({s:.0%})" for p, s in zip(split.phases, split.shares, strict=True)],
        colors=[PHASE_COLOURS[PHASES.index(phase)] for phase in split.phases],
    )
    axes.set_ylim(bottom=0)
    axes.set_ylabel("seconds")
    add_legend(figure, f"mean over {window_of(len(rows))} steps" if len(rows) > 1 else "")
    return True


def draw_learning_rate(figure: Figure, material: Material) -> bool:
    """The schedule as it was, which has no noise to smooth."""
    steps, values = trace(material.rows, "learning_rate")
    if not len(steps):
        return False
    axes = figure.add_subplot()
    axes.plot(steps, values, color=COLOURS[2], linewidth=2, marker="o" if len(steps) == 1 else "")
    axes.set_ylabel("learning rate")
    over_steps(axes, steps)
    return True


def draw_gradient(figure: Figure, material: Material) -> bool:
    """The norm, with the line that it is clipped to."""
    found = gradient(material.rows, material.config)
    if not len(found.steps):
        return False
    axes = figure.add_subplot()
    notes = [_draw_alone(axes, found.steps, found.norm, COLOURS[0], "grad_norm")]
    if found.limit is not None:
        clipped = f"{percent(found.share_clipped)} of the steps clipped"
        name = f"max_grad_norm {plain(found.limit)}: {clipped}"
        if found.limit <= FAR_LIMIT * axes.get_ylim()[1]:
            axes.axhline(found.limit, color=INK, linewidth=1.2, linestyle=DASHES[1], label=name)
        else:  # or the norm would be a line at the bottom
            notes.append(f"far above the picture, {name}")
    axes.set_ylabel("L2 norm")
    over_steps(axes, found.steps)
    add_legend(figure, thin_and_thick(len(found.steps)), *notes)
    return True


def draw_clipping(figure: Figure, material: Material) -> bool:
    """Each fraction that the loss reports."""
    found = clipping(material.rows)
    if not found.fractions:
        return False
    axes = figure.add_subplot()
    for i, (name, fraction) in enumerate(found.fractions.items()):
        draw_curve(
            axes, found.steps, 100 * fraction, colour=COLOURS[i % len(COLOURS)], names=[name],
            dashes=DASHES[i % len(DASHES)], width=max(3.0 - 0.4 * i, 1.5),
        )  # fmt: skip
    axes.set_ylabel("share (%)")
    axes.set_ylim(bottom=0)
    over_steps(axes, found.steps)
    add_legend(figure, thin_and_thick(len(found.steps)))
    return True


def draw_kl_reward(figure: Figure, material: Material) -> bool:
    """The way of the run, its steps as colours."""
    from matplotlib.ticker import MaxNLocator

    found = kl_against_reward(material.rows)
    if not len(found.steps):
        return False
    axes = figure.add_subplot()
    axes.plot(found.smooth_kl, found.reward, color=PALE, linewidth=1, zorder=1)
    kept = np.unique(np.linspace(0, len(found.steps) - 1, 200).round().astype(int))
    points = axes.scatter(
        found.smooth_kl[kept], found.reward[kept], c=found.steps[kept], cmap=MAP, s=16
    )
    ends = ((0, "s", "first step"), (-1, "*", "last step"))
    for i, marker, name in ends[: len(found.steps)]:
        axes.plot(
            found.smooth_kl[i], found.reward[i], marker, color=INK, markersize=9,
            label=f"{name} ({found.steps[i]})",
        )  # fmt: skip
    if len(found.steps) > 1:
        ticks = MaxNLocator(integer=True)
        figure.colorbar(points, ax=axes, label="optimizer step", ticks=ticks)
    axes.set(xlabel="KL to the reference (nats per token)", ylabel="mean reward")
    note = f"means over {window_of(len(found.steps))} steps" if len(found.steps) > 1 else ""
    add_legend(figure, note)
    return True


def draw_memory(figure: Figure, material: Material) -> bool:
    """The peak of each phase in each step, and the plan."""
    split = memory_split(material.rows)
    if split.peak is None and not split.phases:
        return False
    axes = figure.add_subplot()
    keys = [f"memory/{phase}" for phase in split.phases] or ["memory/peak"]
    for i, key in enumerate(keys):
        steps, peak = trace(material.rows, key)
        draw_curve(
            axes, steps, peak / 1e9, colour=PHASE_COLOURS[i], names=[key.removeprefix("memory/")],
            dashes=DASHES[i], width=2.4 - 0.4 * i,
        )  # fmt: skip
    if split.planned is not None and split.of_plan is not None:
        axes.axhline(
            split.planned / 1e9, color=INK, linewidth=1.2, linestyle=DASHES[1],
            label=f"planned, peak at {split.of_plan:.0%} of it",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB")
    over_steps(axes, steps)
    retries = f"{split.retries} times done again in smaller parts" if split.retries else ""
    add_legend(figure, thin_and_thick(len(steps)), retries)
    return True
