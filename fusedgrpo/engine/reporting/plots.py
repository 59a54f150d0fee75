"""The curves of a run as PNG files, drawn from the rows of ``metrics.jsonl`` and from completions.

A plot without data is not drawn.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.drawing.completions import (
    draw_histogram,
    draw_length_reward,
    draw_signal,
)
from fusedgrpo.engine.reporting.drawing.figure import COLOURS, STYLE, Material
from fusedgrpo.engine.reporting.drawing.metrics import (
    PHASE_COLOURS,
    Draw,
    draw_clipping,
    draw_gradient,
    draw_kl_reward,
    draw_learning_rate,
    draw_lengths,
    draw_memory,
    draw_time,
    single,
)
from fusedgrpo.engine.reporting.drawing.rewards import draw_rewards
from fusedgrpo.engine.reporting.looks.curves import PHASES
from fusedgrpo.engine.reporting.metrics_log import Row
from fusedgrpo.engine.reporting.smoothing import smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "PHASES",
    "PHASE_COLOURS",
    "PLOTS",
    "STYLE",
    "Material",
    "figure_of",
    "render",
    "smooth",
    "write_plots",
]

SIZE = (7.2, 3.6)  # inches


class Plot(NamedTuple):
    """title: above the axes. draw: fills an empty figure, or returns False if there is no data."""

    title: str
    draw: Draw


# By the names of their files, in the order of the report.
PLOTS: dict[str, Plot] = {
    "reward": Plot("Reward", draw_rewards),
    "reward_histogram": Plot("How rewards are spread", draw_histogram),
    "group_signal": Plot("Groups with something to learn from", draw_signal),
    "reward_std": Plot(
        "Spread of the reward", single("reward_std", "standard deviation", COLOURS[3])
    ),
    "kl": Plot("KL to the reference policy", single("kl", "nats per token", COLOURS[1])),
    "kl_reward": Plot("What the distance from the reference bought", draw_kl_reward),
    "entropy": Plot("Entropy of the policy", single("entropy", "nats per token", COLOURS[2])),
    "completion_length": Plot("Length of the completions", draw_lengths),
    "length_reward": Plot("Does it pay to be long?", draw_length_reward),
    "time": Plot("Time per step", draw_time),
    "memory": Plot("Peak memory", draw_memory),
    "loss": Plot("Loss (near 0 by design)", single("loss", "loss", COLOURS[4])),
    "grad_norm": Plot("Gradient norm before clipping", draw_gradient),
    "clip_fraction": Plot("What the loss clips", draw_clipping),
    "learning_rate": Plot("Learning rate", draw_learning_rate),
}


def figure_of(name: str, material: Material) -> Figure | None:
    """The plot ``name`` of :data:`PLOTS`, or None if ``material`` has nothing to draw."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    plot = PLOTS[name]
    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
        figure = Figure(figsize=SIZE, layout=layout)
        FigureCanvasAgg(figure)
        if not plot.draw(figure, material):
            return None
        figure.axes[0].set_title(plot.title)
    return figure


def render(name: str, material: Material) -> bytes | None:
    """The plot ``name`` of :data:`PLOTS` as a PNG, or None if ``material`` has nothing to draw."""
    import matplotlib

    figure = figure_of(name, material)
    if figure is None:
        return None
    png = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # In the name of a reward function; a box stands for it.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure.savefig(png, format="png")
    return png.getvalue()


def write_plots(
    rows: Sequence[Row],
    out_dir: str | Path,
    *,
    scores: Scores | None = None,
    config: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``{name}.png`` into ``out_dir`` for every plot that has data; returns the paths.

    scores: of the run's completions; without them, plots of completions are left out. config: the
    run's options; without them, the gradient has no line that it is clipped to.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    material = Material(rows, scores, config)
    written = []
    for name in PLOTS:
        png = render(name, material)
        if png is not None:
            path = out_dir / f"{name}.png"
            path.write_bytes(png)
            written.append(path)
    return written
