"""The panel of a run: what it draws in the columns and lines that there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fusedgrpo.engine.reporting.formatting import (
    gigabytes,
    number,
    percent,
    printable,
    sparkline,
)
from fusedgrpo.engine.reporting.metrics_log import Row, finite, reward_names

PHASES = {"sample": "cyan", "score": "yellow", "update": "magenta"}
WIDEST = 100
THREE_COLUMNS = 74  # narrower, and names or values would be cut
FRAME = 4  # columns of the border and of the space beside it
BORDERS = 2

Pair = tuple[str, str]


@dataclass(slots=True)
class View:
    """All that there is to show.

    row: the metrics of the last step. rewards: its mean rewards so far, oldest first. elapsed,
    left: clock times. pace: seconds per step. split: shares of the phases. notes: those that are
    current. phase: what is going on.
    """

    step: int
    total_steps: int
    plan_line: str
    row: Row
    rewards: Sequence[float]
    eval_reward: float | None
    elapsed: str
    left: str
    pace: float | None
    split: dict[str, float]
    notes: Sequence[str]
    phase: RenderableType
    ascii: bool = False


def draw(view: View, width: int, height: int | None) -> Panel:
    """The panel, no higher than ``height`` lines where its numbers fit into them.

    Where room is short, empty lines go first, then the curve, lines of the plan, of the notes, and
    the rewards of single functions; the step, the reward and what is going on stay.
    """
    inner = width - FRAME
    room = 10**6 if height is None else height - BORDERS
    names = reward_names([view.row])
    shown = len(names)
    numbers, lines = _numbers(view, names, shown, inner)
    fixed = 4  # plan, progress, time and phase
    while shown > 0 and fixed + lines > room:
        shown -= 1
        numbers, lines = _numbers(view, names, shown, inner)
    spare = room - fixed - lines
    notes = _wrapped([f"note  {text}" for text in view.notes], inner)
    taken = notes if len(notes) <= spare else _cut(notes, spare)
    spare -= len(taken)
    curve = bool(view.rewards) and not view.ascii and spare >= 1
    spare -= curve
    plan = _wrapped([view.plan_line], inner)
    plan = plan if len(plan) - 1 <= spare else _cut(plan, spare + 1)
    spare -= len(plan) - 1
    blank = [Text()] if spare >= 2 else []
    body: list[RenderableType] = [
        *(Text(line, style="dim") for line in plan),
        _progress(view),
        *blank,
        numbers,
        *([Text(sparkline(view.rewards, 28), style="green")] if curve else []),
        *blank,
        _time_bar(view, inner),
        *(Text(line, style="yellow") for line in taken),
        _one_line(view.phase),
    ]
    return Panel(Group(*body), title="fusedgrpo", title_align="left", width=width)


def _wrapped(texts: Iterable[str], width: int) -> list[str]:
    console = Console(width=width)
    return [
        line.plain.rstrip()
        for text in texts
        for line in Text(printable(text)).wrap(console, width, tab_size=4)
    ]


def _cut(lines: list[str], count: int) -> list[str]:
    """The first ``count`` lines; the last of them says that there is more."""
    kept = lines[: max(0, count)]
    if kept:
        kept[-1] = f"{kept[-1][:-4].rstrip()} ..." if len(kept[-1]) > 8 else f"{kept[-1]} ..."
    return kept


def _one_line(content: RenderableType) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    grid.add_row(content)
    return grid


def _progress(view: View) -> Table:
    progress = Table.grid(padding=(0, 2), expand=True)
    progress.add_column(no_wrap=True)
    progress.add_column(ratio=1)
    progress.add_column(justify="right", no_wrap=True)
    progress.add_row(
        f"step [bold]{view.step}[/]/{view.total_steps}",
        ProgressBar(total=max(1, view.total_steps), completed=view.step),
        f"{view.elapsed} gone, {view.left} left",
    )
    return progress


def _numbers(view: View, names: Sequence[str], shown: int, inner: int) -> tuple[Table, int]:
    """The numbers in two or three columns, with those of ``shown`` rewards; their lines."""
    row = view.row

    def get(key: str) -> str:
        return number(finite(row.get(key)))

    left = [
        ("reward", get("reward")),
        *((f"  {name}", get(f"rewards/{name}/mean")) for name in names[:shown]),
        ("reward_std", get("reward_std")),
    ]
    if shown < len(names):
        left.insert(1 + shown, (f"  and {len(names) - shown} more", ""))
    if view.eval_reward is not None:
        left.append(("eval_reward", number(view.eval_reward)))
    middle = [
        ("mean_length", get("completions/mean_length")),
        ("clipped_ratio", percent(finite(row.get("completions/clipped_ratio")))),
        ("entropy", get("entropy")),
        ("kl", get("kl")),
    ]
    if "tools/call_frequency" in row:
        middle.insert(2, ("tool calls", get("tools/call_frequency")))
    right = [
        ("loss", get("loss")),
        ("grad_norm", get("grad_norm")),
        ("lr", get("learning_rate")),
        ("tokens/s", get("tokens_per_second")),
    ]
    if (memory := finite(row.get("memory/peak"))) is not None:
        right.append(("peak memory", gigabytes(memory)))
    ratios = [10, 9, 8]
    columns = [left, middle, right]
    if inner < THREE_COLUMNS - FRAME:
        ratios = [1, 1]
        both = middle + right
        columns = [left, both]
        # With few reward functions the first column has room for what is least about the reward.
        while len(both) > len(left) + 1:
            left.append(both.pop())
    outer = Table.grid(padding=(0, 3), expand=True)
    for ratio in ratios:
        outer.add_column(ratio=ratio)
    outer.add_row(*(_pairs(each, first=each is left) for each in columns))
    return outer, max(map(len, columns))


def _pairs(pairs: Iterable[Pair], *, first: bool) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1, no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for i, (name, value) in enumerate(pairs):
        style = "bold green" if first and i == 0 else ""
        grid.add_row(Text(printable(name), style=style or "dim"), Text(value, style=style))
    return grid


def _time_bar(view: View, width: int) -> Text:
    if not view.split:
        return Text("time per step: not known yet", style="dim")
    legend = Text(f"{number(view.pace)} s/step", style="dim")
    for name, share in view.split.items():
        legend.append(f"  {name} {share:.0%}", style=PHASES[name])
    room = width - legend.cell_len - 2
    if room < 10:
        legend.truncate(width, overflow="ellipsis")
        return legend
    bar = Text()
    edge = filled = 0.0
    for name, share in view.split.items():
        edge += share * room
        cells = round(edge) - round(filled)
        bar.append(("#" if view.ascii else "█") * cells, style=PHASES[name])
        filled = edge
    return Text.assemble(legend, "  ", bar)
