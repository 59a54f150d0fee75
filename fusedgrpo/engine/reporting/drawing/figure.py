"""Colours, styles, legends and axes, the same in every plot."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.formatting import one_line, printable, shorten
from fusedgrpo.engine.reporting.metrics_log import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# After Okabe and Ito and Paul Tol: apart for those who see no red or no green.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#332288", "#e69f00", "#56b4e9", "#882255")
INK, GRID, PALE = "#334155", "#e2e8f0", "#94a3b8"
# Line styles for curves that may lie on each other, and which grey print cannot tell apart: the
# first lies under the others and is the widest.
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (7, 2, 1.5, 2)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
WIDTHS = (3.2, 2.2, 2.0, 1.8)
MAP = "viridis_r"  # light is little; even steps of grey

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": False,  # parsing it is a quarter of the time
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "savefig.dpi": 150,
}
LONGEST = 48  # characters of a name in a legend
ROWS, ROW = 2, 0.17  # of a legend: how many a figure has room for; inches of one
LINE = 96  # characters of a legend that are as wide as a figure


@dataclass(frozen=True)
class Material:
    """All that plots are drawn from. rows: of ``metrics.jsonl``. scores: of the completions.
    config: the options of the run."""

    rows: Sequence[Row]
    scores: Scores | None = None
    config: Mapping[str, Any] | None = None


def legible(*names: str) -> str:
    """The names of one thing, for a legend. A space first: matplotlib leaves out labels that start
    with an underscore."""
    short = (shorten(one_line(printable(name)), LONGEST) for name in names)
    return f" {' = '.join(short)}"


def plain(value: float) -> str:
    """A single value that is said in words."""
    return f"{value:.4g}"


def add_legend(figure: Figure, *notes: str, fewest: int = 2) -> None:
    """One legend for all axes of ``figure`` below them, under ``notes``, which say how to read it;
    labels only where there are ``fewest``."""
    handles: list[Any] = []
    labels: list[str] = []
    for axes in figure.axes:
        found = axes.get_legend_handles_labels()
        handles += found[0]
        labels += found[1]
    note = "; ".join(filter(None, notes))
    if len(labels) < fewest:
        handles, labels = [], []
    if not labels and not note:
        return
    columns = max(1, min(4, LINE // (max(map(len, labels), default=0) + 7)))
    rows = -(-len(labels) // columns)
    if rows > ROWS:  # or the axes would have to make room for it
        figure.set_figheight(figure.get_figheight() + ROW * (rows - ROWS))
    legend = figure.legend(
        handles,
        [textwrap.fill(label, LINE, drop_whitespace=False) for label in labels],
        loc="outside lower left",
        ncols=columns,
        title=note or None,
        alignment="left",
        handlelength=3.4,
        markerscale=1.5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a reward function may be called anything, $ included


def over_steps(axes: Axes, steps: np.ndarray) -> None:
    """Make the x axis one of optimizer steps, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if len(np.unique(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
