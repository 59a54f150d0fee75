"""The curves of a run as PNG files, drawn from the rows of ``metrics.jsonl``.

Each value is drawn thin as it was logged, and thick as the mean of its neighbourhood. A plot
without data is not drawn. matplotlib's object interface only: no pyplot, no global figure.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgrpo.engine.reporting.metrics_log import Row, reward_names, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#b91c1c")
INK, GRID = "#334155", "#e2e8f0"
PHASES = ("sample", "score", "update")
PHASE_COLOURS = (COLOURS[5], COLOURS[1], COLOURS[4])

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.01,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.use_mathtext": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 150,
}


def smooth(values: Sequence[float]) -> list[float]:
    """The centred moving mean over about a tenth of the run (3 steps at least)."""
    half = max(1, len(values) // 20)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return means


def draw_curve(axes: Axes, rows: Sequence[Row], key: str, label: str, colour: str) -> bool:
    """Draw one metric, thin and smoothed; False if no row has it."""
    steps, values = series(rows, key)
    if not steps:
        return False
    lone = "o" if len(steps) == 1 else ""
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    # A space first: matplotlib leaves labels that start with an underscore out of the legend.
    axes.plot(steps, smooth(values), color=colour, linewidth=2, marker=lone, label=f" {label}")
    return True


def draw_reward(axes: Axes, rows: Sequence[Row]) -> bool:
    drawn = draw_curve(axes, rows, "reward", "reward (weighted sum)", COLOURS[0])
    names = reward_names(rows)
    for i, name in enumerate(names):
        colour = COLOURS[1 + i % (len(COLOURS) - 1)]
        if series(rows, f"rewards/{name}/mean") != series(
            rows, "reward"
        ):  # else one hides the other
            drawn |= draw_curve(axes, rows, f"rewards/{name}/mean", name, colour)
    steps, values = series(rows, "eval_reward")
    if steps:
        axes.plot(steps, values, "D--", color=INK, markersize=5, label="held-out prompts")
    return drawn


def draw_lengths(axes: Axes, rows: Sequence[Row]) -> bool:
    if not draw_curve(axes, rows, "completions/mean_length", "mean", COLOURS[0]):
        return False
    low_steps, low = series(rows, "completions/min_length")
    high_steps, high = series(rows, "completions/max_length")
    if low_steps == high_steps:
        axes.fill_between(
            low_steps, low, high, color=COLOURS[0], alpha=0.1, linewidth=0, label="min to max"
        )
    axes.set_ylim(bottom=0)
    steps, clipped = series(rows, "completions/clipped_ratio")
    if steps:
        share = axes.twinx()
        share.plot(steps, [100 * value for value in smooth(clipped)], color=COLOURS[7], ls=":")
        share.set(ylabel="cut off by the limit (%)", ylim=(0, 105))
        share.yaxis.label.set_color(COLOURS[7])
        share.tick_params(axis="y", colors=COLOURS[7])
        share.grid(False)
    return True


def draw_time(axes: Axes, rows: Sequence[Row]) -> bool:
    timed = [row for row in rows if series([row], "time/update")[0]]
    if not timed:
        return False
    steps: list[float] = [row["step"] for row in timed]
    seconds = [[row.get(f"time/{phase}") or 0.0 for row in timed] for phase in PHASES]
    total = sum(map(sum, seconds)) or 1.0
    labels = [f"{p} ({sum(s) / total:.0%})" for p, s in zip(PHASES, seconds, strict=True)]
    seconds = [smooth(values) for values in seconds]
    if len(steps) == 1:  # an area needs two points
        steps = [steps[0] - 0.3, steps[0] + 0.3]
        seconds = [values * 2 for values in seconds]
    axes.stackplot(steps, *seconds, labels=labels, colors=PHASE_COLOURS, alpha=0.85)
    axes.set_ylim(bottom=0)
    return True


def draw_learning_rate(axes: Axes, rows: Sequence[Row]) -> bool:
    steps, values = series(rows, "learning_rate")
    axes.plot(steps, values, color=COLOURS[6], linewidth=2, marker="o" if len(steps) == 1 else "")
    return bool(steps)


def single(key: str, colour: str) -> Callable[[Axes, Sequence[Row]], bool]:
    """A plot of one metric that needs no legend."""

    def draw(axes: Axes, rows: Sequence[Row]) -> bool:
        return draw_curve(axes, rows, key, key, colour)

    return draw


# File name -> title, label of the y axis, how to draw it. In the order of the report.
PLOTS: dict[str, tuple[str, str, Callable[[Axes, Sequence[Row]], bool]]] = {
    "reward": ("Reward", "mean over completions", draw_reward),
    "reward_std": (
        "Spread of the reward (what there is to learn from)",
        "standard deviation",
        single("reward_std", COLOURS[3]),
    ),
    "kl": ("KL to the reference policy", "nats per token", single("kl", COLOURS[1])),
    "entropy": ("Entropy of the policy", "nats per token", single("entropy", COLOURS[2])),
    "completion_length": ("Length of the completions", "tokens", draw_lengths),
    "time": ("Time per step", "seconds", draw_time),
    "loss": ("Loss (near 0 by design)", "loss", single("loss", COLOURS[4])),
    "grad_norm": ("Gradient norm before clipping", "L2 norm", single("grad_norm", COLOURS[5])),
    "learning_rate": ("Learning rate", "learning rate", draw_learning_rate),
}


def render(name: str, rows: Sequence[Row]) -> bytes | None:
    """The plot ``name`` of :data:`PLOTS` as a PNG, or None if ``rows`` have nothing to draw."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    title, unit, draw = PLOTS[name]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not draw(axes, rows):
            return None
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if len({row["step"] for row in rows}) == 1:
            axes.set_xlim(rows[0]["step"] - 1, rows[0]["step"] + 1)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            for text in figure.legend(loc="outside lower left", ncols=4).get_texts():
                text.set_parse_math(False)  # a reward function may be called anything, $ included
        png = io.BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def write_plots(rows: Sequence[Row], out_dir: str | Path) -> list[Path]:
    """Write ``{name}.png`` into ``out_dir`` for every plot that has data; returns the paths."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name in PLOTS:
        png = render(name, rows)
        if png is not None:
            path = out_dir / f"{name}.png"
            path.write_bytes(png)
            written.append(path)
    return written
