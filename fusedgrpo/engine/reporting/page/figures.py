"""Pictures of completions for a page, as shapes of SVG: what a line over steps cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting import looks
from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.formatting import number, percent, quantity
from fusedgrpo.engine.reporting.looks.lengths import Cloud
from fusedgrpo.engine.reporting.looks.tables import TimeBins
from fusedgrpo.engine.reporting.metrics_log import Row

# Of a drawing in units of SVG, and of the room around its axes. A phone shows it at three quarters.
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 40
COLUMNS = 60
MOST_DOTS = 400  # of a trajectory


@dataclass(frozen=True)
class Mark:
    """kind: the SVG element. title: shown where one points at it. text: in it."""

    kind: str
    attributes: dict[str, Any]
    title: str = ""
    text: str = ""


@dataclass(frozen=True)
class Figure:
    """legend: colour of the page's and words. summary: for those who cannot see it."""

    title: str
    marks: list[Mark]
    note: str
    summary: str
    legend: list[tuple[str, str]] = field(default_factory=list)
    width: int = WIDTH
    height: int = HEIGHT


def completion_figures(scores: Scores, rows: Sequence[Row]) -> list[Figure]:
    """The pictures that there is something to draw of."""
    found = [_histogram(scores), _signal(scores), _lengths(scores), _way(rows)]
    return [figure for figure in found if figure is not None]


def _histogram(scores: Scores) -> Figure | None:
    found = looks.reward_histogram(scores, columns=COLUMNS)
    if found.least is None:
        return None
    axes = _Axes(found.time.edges[[0, -1]], found.edges[[0, -1]])
    marks = []
    for c in range(len(found.time)):
        for r in range(len(found.edges) - 1):
            if not found.counts[r, c]:
                continue
            x, y = axes.x(found.time.edges[c]), axes.y(found.edges[r + 1])
            what = (
                number(float(found.values[r]))
                if found.values is not None
                else f"{number(float(found.edges[r]))} to {number(float(found.edges[r + 1]))}"
            )
            share = float(found.shares[r, c])
            marks.append(
                axes.box(
                    (x, y, axes.x(found.time.edges[c + 1]), axes.y(found.edges[r])),
                    "f0",
                    f"{_steps(found.time, c)}: {quantity(found.counts[r, c], 'completion')} "
                    f"({percent(share)}) with reward {what}",
                    opacity=0.08 + 0.92 * math.sqrt(share),
                )
            )
    ticks = found.values if found.values is not None else None
    return Figure(
        "How rewards are spread",
        [*marks, *axes.frame("step", "reward", ticks)],
        "The stronger the colour, the more completions of these steps have this reward. Point at "
        "a cell for its number.",
        f"Rewards from {number(found.least)} to {number(found.greatest)}.",
    )


def _signal(scores: Scores) -> Figure | None:
    found = looks.group_signal(scores, columns=COLUMNS)
    if not len(found.time):
        return None
    axes = _Axes(found.time.edges[[0, -1]], np.array([0.0, 1.0]))
    kinds = [
        ("divided", "f5", "k5", "rewards differ: something to learn from"),
        ("solved", "f2", "k2", "all have the greatest reward"),
        ("same", "f1", "k1", "all have one that is less"),
        ("unscored", "f7", "k7", "none has a reward"),
    ]
    marks, legend, begin = [], [], np.zeros(len(found.time))
    for name, fill, key, words in kinds:
        shares = getattr(found, name)
        if not shares.any():
            continue
        legend.append((key, words))
        for c in np.flatnonzero(shares).tolist():
            corners = (
                axes.x(found.time.edges[c]),
                axes.y(begin[c] + shares[c]),
                axes.x(found.time.edges[c + 1]),
                axes.y(begin[c]),
            )
            groups = quantity(found.groups[c], "group")
            said = f"{_steps(found.time, c)}: {percent(shares[c])} of {groups}, "
            marks.append(axes.box(corners, fill, said + words, opacity=0.8))
        begin = begin + shares
    return Figure(
        "Groups with something to learn from",
        [*marks, *axes.frame("step", "share of groups")],
        "A group whose completions all have one reward has no gradient.",
        f"Rewards differ in {percent(float(found.divided[0]))} of the groups at first, in "
        f"{percent(float(found.divided[-1]))} at last.",
        legend,
    )


def _lengths(scores: Scores) -> Figure | None:
    found = looks.length_against_reward(scores, columns=COLUMNS)
    clouds = [cloud for cloud in (found.early, found.late) if cloud is not None]
    if not clouds:
        return None
    lengths = np.concatenate([cloud.length for cloud in clouds])
    rewards = np.concatenate([cloud.reward for cloud in clouds])
    axes = _Axes(_wider(lengths), _wider(rewards))
    marks, legend = [], []
    for i, cloud in enumerate(clouds):
        # Beside each other, so that equal rewards of both times do not lie on each other.
        shift = 3 * (2 * i - 1) if len(clouds) > 1 else 0
        points = np.unique(np.stack([cloud.length, cloud.reward], axis=1), axis=0)
        for length, reward in points:
            place = {"cx": _at(axes.x(length)), "cy": _at(axes.y(reward) + shift), "r": 2.5}
            look = {"class": f"f{i}", "fill-opacity": 0.5}
            title = f"{length:.0f} tokens, reward {number(float(reward))}, {_cloud(cloud)}"
            marks.append(Mark("circle", place | look, title))
        legend.append((f"k{i}", f"{_cloud(cloud)}: correlation {_correlation(cloud)}"))
    return Figure(
        "Does it pay to be long?",
        [*marks, *axes.frame("length (tokens)", "reward")],
        "A dot is a completion, of at most 400 from each time.",
        "; ".join(words for _, words in legend) + ".",
        legend,
    )


def _way(rows: Sequence[Row]) -> Figure | None:
    found = looks.kl_against_reward(rows)
    known = np.isfinite(found.smooth_kl) & np.isfinite(found.reward)
    steps, kl, reward = found.steps[known], found.smooth_kl[known], found.reward[known]
    if len(steps) < 2 or not np.ptp(kl):
        return None
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_DOTS)).round().astype(int))
    steps, kl, reward = steps[kept], kl[kept], reward[kept]
    axes = _Axes(_wider(kl), _wider(reward))
    places = [(_at(axes.x(a)), _at(axes.y(b))) for a, b in zip(kl, reward, strict=True)]
    line = "M" + " L".join(f"{x} {y}" for x, y in places)
    marks = [Mark("path", {"d": line, "class": "s0 line"})]
    for i, (x, y) in enumerate(places):
        end = i in (0, len(places) - 1)
        title = f"step {steps[i]}: KL {number(float(kl[i]))}, reward {number(float(reward[i]))}"
        look = {"class": "f1" if i else "f5", "r": 5 if end else 2.5}
        look |= {} if end else {"fill-opacity": 0.25}
        marks.append(Mark("circle", {"cx": x, "cy": y} | look, title))
    return Figure(
        "What the distance from the reference bought",
        [*marks, *axes.frame("KL to the reference (nats a token)", "reward")],
        "The way of the run, smoothed over a tenth of it.",
        f"From KL {number(float(kl[0]))} and reward {number(float(reward[0]))} to KL "
        f"{number(float(kl[-1]))} and reward {number(float(reward[-1]))}.",
        [("k5", f"step {steps[0]}"), ("k1", f"step {steps[-1]}")],
    )


class _Axes:
    """From values to places. x_range, y_range: least and greatest value."""

    def __init__(self, x_range: np.ndarray, y_range: np.ndarray):
        self.x_range = _apart(x_range)
        self.y_range = _apart(y_range)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + float(value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - float(value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def box(
        self, corners: tuple[float, float, float, float], fill: str, title: str, opacity: float
    ) -> Mark:
        x0, y0, x1, y1 = corners
        size = {"x": _at(x0), "y": _at(y0), "width": _at(x1 - x0), "height": _at(y1 - y0)}
        return Mark("rect", size | {"class": fill, "fill-opacity": f"{opacity:.2f}"}, title)

    def frame(
        self, x_label: str, y_label: str, y_ticks: np.ndarray | None = None
    ) -> Iterator[Mark]:
        floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for x1, y1, x2, y2 in ((LEFT, floor, right, floor), (LEFT, TOP, LEFT, floor)):
            yield Mark("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": "axis"})
        for tick in _ticks(*self.x_range, 6):
            place = {"x": _at(self.x(tick)), "y": floor + 16, "text-anchor": "middle"}
            yield Mark("text", place, text=_tick(tick))
        ticks = _ticks(*self.y_range, 5) if y_ticks is None else y_ticks.tolist()
        for tick in ticks:
            place = {"x": LEFT - 6, "y": _at(self.y(tick) + 4), "text-anchor": "end"}
            yield Mark("text", place, text=_tick(tick))
        middle = (LEFT + right) / 2
        yield Mark("text", {"x": middle, "y": HEIGHT - 5, "text-anchor": "middle"}, text=x_label)
        turn = f"translate(12 {(TOP + floor) / 2}) rotate(-90)"
        yield Mark("text", {"transform": turn, "text-anchor": "middle"}, text=y_label)


def _apart(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if low < high:
        return low, high
    room = abs(low) * 0.1 or 0.5
    return low - room, high + room


def _wider(values: np.ndarray) -> np.ndarray:
    """The range of values with some room around it."""
    low, high = _apart(values)
    room = 0.06 * (high - low)
    return np.asarray([low - room, high + room])


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` at most."""
    size = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(size))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= size)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.0e}"


def _at(place: float) -> str:
    return f"{place:.1f}"


def _steps(time: TimeBins, column: int) -> str:
    first, last = int(time.first[column]), int(time.last[column])
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _cloud(cloud: Cloud) -> str:
    return (
        f"step {cloud.first}"
        if cloud.first == cloud.last
        else f"steps {cloud.first} to {cloud.last}"
    )


def _correlation(cloud: Cloud) -> str:
    return "unknown, one of both is constant" if cloud.correlation is None else (
        f"{cloud.correlation:+.2f}"
    )  # fmt: skip
