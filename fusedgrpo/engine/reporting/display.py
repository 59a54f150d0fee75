"""The progress of a run: a live panel on a terminal, one line per logged step anywhere else."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fusedgrpo.engine.callbacks import Callback
from fusedgrpo.engine.reporting.completions_log import prompt_text
from fusedgrpo.engine.reporting.formatting import (
    clock,
    gigabytes,
    number,
    one_line,
    percent,
    printable,
    shorten,
    sparkline,
)
from fusedgrpo.engine.reporting.metrics_log import Row, finite, reward_names
from fusedgrpo.engine.reporting.plain_log import plain
from fusedgrpo.engine.reporting.terminal import forgiving

logger = logging.getLogger("fusedgrpo")

PHASES = {"sample": "cyan", "score": "yellow", "update": "magenta"}
RECENT = 20  # steps that speed, ETA and the time split are averaged over
PANEL_WIDTH = 100


def mean_row(rows: Iterable[Row]) -> dict[str, float]:
    """The mean of every key over the rows that have it as a finite number."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if (v := finite(value)) is not None:
                columns.setdefault(key, []).append(v)
    return {key: fmean(values) for key, values in columns.items()}


class Display(Callback):
    """Shows a run while it goes; a context manager.

    total_steps: optimizer steps of the whole run.
    plan_line: what a step is, in one line; shown at the top.
    logging_steps: without a terminal, the first, the last and every such step give a line, with
        each value averaged over the steps since the line before (the panel shows every step).
    first_step: steps already done when a run is resumed.
    shows: told a step, and whether it would be the first line, it says whether that is one; in
        place of logging_steps.
    panel: False for lines in a terminal as well.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        plan_line: str,
        logging_steps: int = 10,
        first_step: int = 0,
        shows: Callable[[int, bool], bool] | None = None,
        panel: bool = True,
        console: Console | None = None,
    ):
        self.console = console or Console(
            file=forgiving(sys.stdout, "Standard output"), highlight=False
        )
        self.total_steps = total_steps
        self.plan_line = plan_line
        self._shows = shows or (
            lambda step, first: first or step == total_steps or step % logging_steps == 0
        )
        self.step = first_step
        self._ascii = not self.console.encoding.startswith("utf")
        if self._ascii and hasattr(self.console.file, "reconfigure"):
            # A completion may hold any character, and none of them may end the run.
            self.console.file.reconfigure(errors="replace")
        self.is_live = panel and overwrites(self.console)
        self._live: Live | None = None
        self._lock = threading.Lock()  # rich draws the panel from a thread of its own
        self._row: Row = {}
        self._recent: deque[Row] = deque(maxlen=RECENT)
        self._unprinted: list[Row] = []
        self._rewards: deque[float] = deque(maxlen=40)
        self._notes: set[str] = set()
        self._started = time.monotonic()
        self._step_ends: deque[float] = deque([self._started], maxlen=RECENT + 1)
        self._phase: RenderableType = Text("starting")
        self._phase_name = ""
        self._eval_reward: float | None = None

    def __enter__(self) -> Display:
        if self.is_live:
            self._live = Live(
                console=self.console, get_renderable=self._panel, refresh_per_second=4
            )
            self._live.start()
        else:
            self._print(self.plan_line)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._phase = Text("done") if kind is None else Text("stopped", style="red")
            self._live.stop()
            self._live = None

    def phase(self, name: str) -> None:
        """Say what is going on, such as ``"sample"``; lines say it before the first step only."""
        self._phase_name = name
        self._phase = Spinner("line" if self._ascii else "dots", text=name, style="cyan")
        if not self.is_live and not self._recent:
            self._print(f"  {name} ...")

    def detail(self, text: str) -> None:
        """Say how far what is going on has come: beside it in the panel, else in a line."""
        if not self.is_live:
            logger.info(text)
            self._print(f"  {text}")
        elif isinstance(self._phase, Spinner):
            self._phase.update(text=f"{self._phase_name}  {text}".rstrip())

    def on_step(self, row: Row) -> None:
        self.update(row["step"], row)

    def update(self, step: int, row: Row) -> None:
        """Show the metrics of a finished optimizer step (numbered from 1)."""
        with self._lock:
            self.step = step
            self._row = row
            self._recent.append(row)
            self._step_ends.append(time.monotonic())
            if (reward := finite(row.get("reward"))) is not None:
                self._rewards.append(reward)
            if (eval_reward := finite(row.get("eval_reward"))) is not None:
                self._eval_reward = eval_reward
        if self.is_live:
            return
        self._unprinted.append(row)
        if self._shows(step, len(self._recent) == 1):
            self._print(self._line(mean_row(self._unprinted)))
            self._unprinted.clear()

    def note(self, text: str) -> None:
        """Say ``text``, once however often it is called, on the console and in the log."""
        if text in self._notes:
            return
        self._notes.add(text)
        logger.info(text)
        self.console.print(Text.assemble(("note  ", "bold yellow"), plain(text)), soft_wrap=True)

    def completions(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Show sampled completions (records of ``completions/*.jsonl``), group by group."""
        if self.is_live:
            self.console.print(completions_table(step, records))
            return
        self._print(f"completions of step {step}")
        for _, group in groupby(records, key=lambda record: record["group"]):
            for i, record in enumerate(group):
                if i == 0:
                    self._print(f"  row {record['row']}: {one_line(prompt_text(record['prompt']))}")
                scores = "  ".join(f"{n} {number(v)}" for n, v in record["rewards"].items())
                self._print(
                    f"    reward {number(record['reward'])}  ({scores})  "
                    f"advantage {number(record['advantage'])}  "
                    f"{record['length']} tokens, {record['finish_reason']}: "
                    f"{one_line(record['completion'])}"
                )

    def _print(self, line: str) -> None:
        self.console.print(Text(printable(line)), soft_wrap=True)

    def _seconds_per_step(self) -> float | None:
        if len(self._step_ends) < 2:
            return None
        return (self._step_ends[-1] - self._step_ends[0]) / (len(self._step_ends) - 1)

    def _left(self) -> str:
        pace = self._seconds_per_step()
        return "-" if pace is None else clock(pace * max(0, self.total_steps - self.step))

    def _time_split(self) -> dict[str, float]:
        """Shares of sampling, scoring and updating in the recent steps; empty if unknown."""
        seconds = {
            name: sum(finite(row.get(f"time/{name}")) or 0.0 for row in self._recent)
            for name in PHASES
        }
        total = sum(seconds.values())
        return {name: value / total for name, value in seconds.items()} if total > 0 else {}

    def _line(self, row: Row) -> str:
        width = len(str(self.total_steps))

        def get(key: str) -> str:
            return number(finite(row.get(key)))

        parts = [
            f"step {self.step:{width}d}/{self.total_steps}",
            f"reward {get('reward')}",
            f"reward_std {get('reward_std')}",
            *(f"{name} {get(f'rewards/{name}/mean')}" for name in reward_names([row])),
            f"eval_reward {get('eval_reward')}" if "eval_reward" in row else "",
            f"kl {get('kl')}" if "kl" in row else "",
            f"entropy {get('entropy')}",
            f"length {get('completions/mean_length')}",
            f"clipped {percent(finite(row.get('completions/clipped_ratio')))}",
            f"loss {get('loss')}",
            f"grad_norm {get('grad_norm')}",
            f"lr {get('learning_rate')}",
            f"{get('tokens_per_second')} tok/s",
            f"memory {gigabytes(row['memory/peak'])}" if "memory/peak" in row else "",
            f"{number(self._seconds_per_step())} s/step",
            " ".join(f"{name} {share:.0%}" for name, share in self._time_split().items()),
            f"left {self._left()}",
        ]
        return "  ".join(part for part in parts if part)

    def _panel(self) -> Panel:
        with self._lock:
            return self._draw(min(self.console.width, PANEL_WIDTH))

    def _draw(self, width: int) -> Panel:
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column()
        progress.add_column(ratio=1)
        progress.add_column(justify="right")
        elapsed = clock(time.monotonic() - self._started)
        progress.add_row(
            f"step [bold]{self.step}[/]/{self.total_steps}",
            ProgressBar(total=max(1, self.total_steps), completed=self.step),
            f"{elapsed} gone, {self._left()} left",
        )
        body = [
            Text(printable(self.plan_line), style="dim"),
            progress,
            Text(),
            self._numbers(),
            Text(),
            self._time_bar(width - 4),
            self._phase,
        ]
        return Panel(Group(*body), title="fusedgrpo", title_align="left", width=width)

    def _numbers(self) -> Table:
        row = self._row
        names = reward_names([row])

        def get(key: str) -> str:
            return number(finite(row.get(key)))

        left = [
            ("reward", get("reward")),
            *((f"  {name}", get(f"rewards/{name}/mean")) for name in names),
            ("reward_std", get("reward_std")),
        ]
        if self._eval_reward is not None:
            left.append(("eval_reward", number(self._eval_reward)))
        middle = [
            ("mean_length", get("completions/mean_length")),
            ("clipped_ratio", percent(finite(row.get("completions/clipped_ratio")))),
            ("entropy", get("entropy")),
            ("kl", get("kl")),
        ]
        right = [
            ("loss", get("loss")),
            ("grad_norm", get("grad_norm")),
            ("lr", get("learning_rate")),
            ("tokens/s", get("tokens_per_second")),
        ]
        if (memory := finite(row.get("memory/peak"))) is not None:
            right.append(("peak memory", gigabytes(memory)))
        outer = Table.grid(padding=(0, 3), expand=True)
        for ratio in (10, 9, 8):
            outer.add_column(ratio=ratio)
        outer.add_row(self._pairs(left, "bold green"), self._pairs(middle), self._pairs(right))
        if self._rewards and not self._ascii:
            outer.add_row(Text(sparkline(self._rewards, 28), style="green"))
        return outer

    @staticmethod
    def _pairs(pairs: Iterable[tuple[str, str]], first_style: str = "") -> Table:
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1, no_wrap=True)
        grid.add_column(justify="right", no_wrap=True)
        for i, (name, value) in enumerate(pairs):
            style = first_style if i == 0 else ""
            grid.add_row(Text(printable(name), style=style or "dim"), Text(value, style=style))
        return grid

    def _time_bar(self, width: int) -> Text:
        split = self._time_split()
        if not split:
            return Text("time per step: not known yet", style="dim")
        legend = Text(f"{number(self._seconds_per_step())} s/step", style="dim")
        for name, share in split.items():
            legend.append(f"  {name} {share:.0%}", style=PHASES[name])
        bar = Text()
        room = max(10, width - legend.cell_len - 2)
        edge = filled = 0.0
        for name, share in split.items():
            edge += share * room
            cells = round(edge) - round(filled)
            bar.append(("#" if self._ascii else "█") * cells, style=PHASES[name])
            filled = edge
        return Text.assemble(legend, "  ", bar)


def overwrites(console: Console) -> bool:
    """Whether lines of ``console`` can be drawn again. FORCE_COLOR makes rich take a pipe for a
    terminal; a log file full of cursor moves helps nobody, so the file itself is asked as well."""
    return console.is_interactive and bool(console.file.isatty())


def completions_table(step: int, records: Sequence[Mapping[str, Any]]) -> Table:
    """A table of sampled completions: the prompt once per group, then one row per completion."""
    table = Table(title=f"Completions of step {step}", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=4)
    table.add_column("reward", ratio=2)
    table.add_column("adv.", justify="right", no_wrap=True)
    table.expand = True
    for _, group in groupby(records, key=lambda record: record["group"]):
        for i, record in enumerate(group):
            prompt = shorten(prompt_text(record["prompt"])) if i == 0 else ""
            scores = [f"{name} {number(value)}" for name, value in record["rewards"].items()]
            table.add_row(
                Text(printable(prompt)),
                Text(printable(shorten(record["completion"]))),
                Text(printable("\n".join([number(record["reward"]), *scores]))),
                Text(number(record["advantage"])),
            )
    return table
