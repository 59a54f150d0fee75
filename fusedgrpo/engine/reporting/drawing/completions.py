"""The plots that are of single completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fusedgrpo.engine.reporting.drawing.curves import view_of
from fusedgrpo.engine.reporting.drawing.figure import (
    COLOURS,
    DASHES,
    MAP,
    PALE,
    Material,
    add_legend,
    over_steps,
    plain,
)
from fusedgrpo.engine.reporting.looks.lengths import Cloud, length_against_reward
from fusedgrpo.engine.reporting.looks.rewards import FEW_VALUES, group_signal, reward_histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_histogram(figure: Figure, material: Material) -> bool:
    """Rewards upwards, steps to the right, colours for shares."""
    if material.scores is None:
        return False
    found = reward_histogram(material.scores)
    if found.least is None or found.greatest is None:
        return False
    axes = figure.add_subplot()
    edges = found.edges if found.values is None else np.arange(len(found.edges)) - 0.5
    shares = np.ma.masked_equal(100 * found.shares, 0)
    cells = axes.pcolormesh(found.time.edges, edges, shares, cmap=MAP, vmin=0)
    if found.values is not None:
        axes.set_yticks(range(len(found.values)), [plain(v) for v in found.values.tolist()])
    axes.grid(False)
    axes.set_ylabel("reward of a completion")
    over_steps(axes, found.time.edges)
    figure.colorbar(cells, ax=axes, label="completions of these steps (%)")
    outside = found.values is None and (found.least, found.greatest) != (edges[0], edges[-1])
    note = f"the outer rows hold all from {plain(found.least)} to {plain(found.greatest)}"
    add_legend(figure, note if outside else "")
    return True


def draw_signal(figure: Figure, material: Material) -> bool:
    """The kinds of groups, adding up to all of them."""
    if material.scores is None or not len(material.scores):
        return False
    found = group_signal(material.scores)
    layers = {
        "solved: all have the greatest reward": (found.solved, COLOURS[2], ""),
        "signal: rewards differ": (found.divided, COLOURS[6], ""),
        "none: all the same": (found.same, COLOURS[1], "///"),
        "without a reward": (found.unscored, PALE, "..."),
    }
    axes = figure.add_subplot()
    below = np.zeros(len(found.time) + 1)
    for label, (share, colour, hatch) in layers.items():
        if not share.any():
            continue
        above = below + 100 * np.append(share, share[-1])
        axes.fill_between(
            found.time.edges, below, above, step="post", facecolor=colour, hatch=hatch,
            edgecolor="white", linewidth=0, label=f"{label} ({_mean_share(share, found.groups)})",
        )  # fmt: skip
        below = above
    axes.set(ylabel="groups (%)", ylim=(0, 100))
    over_steps(axes, found.time.edges)
    add_legend(figure, "in brackets: of the whole run", fewest=1)
    return True


def _mean_share(share: np.ndarray, groups: np.ndarray) -> str:
    return f"{np.average(share, weights=groups):.0%}"


def draw_length_reward(figure: Figure, material: Material) -> bool:
    """Left single completions, right the groups."""
    if material.scores is None:
        return False
    found = length_against_reward(material.scores)
    clouds = [cloud for cloud in (found.early, found.late) if cloud is not None]
    rewards = np.concatenate([[], *(cloud.reward for cloud in clouds)])
    if not len(rewards) or np.ptp(rewards) == 0:
        return False
    if np.isnan([found.above, found.below]).all():
        add_legend(figure, _draw_clouds(figure.add_subplot(), clouds), fewest=1)
        return True
    left, right = figure.subplots(1, 2)
    beyond = _draw_clouds(left, clouds)
    middle = (found.time.edges[1:] + found.time.edges[:-1]) / 2
    for i, (name, length) in enumerate((("above", found.above), ("below", found.below))):
        right.plot(
            middle, length, color=COLOURS[i], linestyle=DASHES[i], marker="os"[i], markersize=3,
            label=f"{name} the mean reward of the group",
        )  # fmt: skip
    right.set_ylabel("mean length (tokens)")
    over_steps(right, middle)
    add_legend(figure, beyond)
    return True


def _draw_clouds(axes: Axes, clouds: list[Cloud]) -> str:
    """Draw a point for each completion; returns what to say of those that are far out."""
    values = np.unique(np.concatenate([cloud.reward for cloud in clouds]))
    # Single values are spread a little, or hundreds of points were one.
    few = len(values) <= FEW_VALUES
    apart = float(np.diff(values).min()) if few and len(values) > 1 else 0.0
    styles = (("o", COLOURS[4]), ("^", COLOURS[5]))
    for i, (cloud, (marker, colour)) in enumerate(zip(clouds, styles, strict=False)):
        spread = apart * (0.22 * np.random.default_rng(0).random(len(cloud.reward)) + 0.02)
        axes.scatter(
            cloud.length, cloud.reward + (spread if i else -spread), s=12, marker=marker,
            color=colour, alpha=0.5, linewidth=0,
            label=f"steps {cloud.first} to {cloud.last}: correlation "
            + ("-" if cloud.correlation is None else f"{cloud.correlation:.2f}"),
        )  # fmt: skip
    axes.set(xlabel="length (tokens)", ylabel="reward of a completion")
    view = view_of(cloud.reward for cloud in clouds)
    if view is not None:
        axes.set_ylim(view.low, view.high)
    elif few:
        axes.set_yticks(values, [plain(value) for value in values.tolist()])
    return "" if view is None else view.note
