"""The progress of a run: a live panel on a terminal, one line per logged step anywhere else."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from fusedgrpo import stages
from fusedgrpo.engine.callbacks import Callback
from fusedgrpo.engine.reporting.advisor import Note
from fusedgrpo.engine.reporting.completions_table import completion_lines, completions_table
from fusedgrpo.engine.reporting.formatting import (
    clock,
    gigabytes,
    number,
    percent,
    printable,
)
from fusedgrpo.engine.reporting.metrics_log import Row, finite, mean_row, reward_names
from fusedgrpo.engine.reporting.metrics_table import metrics_table
from fusedgrpo.engine.reporting.notebook import NotebookOutput
from fusedgrpo.engine.reporting.panel import PHASES, WIDEST, View, draw
from fusedgrpo.engine.reporting.plain_log import plain
from fusedgrpo.engine.reporting.terminal import drawn, forgiving, is_notebook, overwrites

logger = logging.getLogger("fusedgrpo")

RECENT = 20  # steps that speed, ETA and the time split are averaged over


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
            file=forgiving(sys.stdout, "Standard output"),
            highlight=False,
            force_jupyter=None if panel else False,  # where lines are lines, and no outputs each
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
        self._in_notebook = panel and is_notebook(self.console)
        self.is_live = self._in_notebook or (panel and overwrites(self.console))
        self._live: Live | NotebookOutput | None = None
        self._stack = ExitStack()
        self._lock = threading.Lock()  # rich draws the panel from a thread of its own
        self._row: Row = {}
        self._recent: deque[Row] = deque(maxlen=RECENT)
        self._unprinted: list[Row] = []
        self._rewards: deque[float] = deque(maxlen=40)
        self._notes: set[str] = set()
        self._current: list[Note] = []
        self._table: RenderableType | None = None
        self._started = time.monotonic()
        self._step_ends: deque[float] = deque([self._started], maxlen=RECENT + 1)
        self._phase: RenderableType = Text("starting")
        self._phase_name = ""
        self._eval_reward: float | None = None

    def __enter__(self) -> Display:
        self._stack.enter_context(stages.listening(stages.Unseen()))
        if self._in_notebook:
            self._live = NotebookOutput(self._panel, min(self.console.width, WIDEST))
            self._live.start()
            self._stack.callback(self._live.stop)
        elif self.is_live:
            self._live = Live(
                console=self.console,
                get_renderable=self._panel,
                refresh_per_second=4,
                # One that goes to a file is to go on going there.
                redirect_stderr=sys.stderr is not None and sys.stderr.isatty(),
            )
            self._stack.enter_context(drawn(self._live))
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
            self.advice([], self._current, [])  # it stays on the screen, above the panel
        self._stack.close()
        self._live = None
        if self._table is not None and self._in_notebook:
            self.console.print(self._table)

    def phase(self, name: str) -> None:
        """Say what is going on, such as ``"sample"``; lines say it before the first step only."""
        self._phase_name = name
        self._phase = self._busy(name)
        self._redraw()
        if not self.is_live and not self._recent:
            self._print(f"  {name} ...")

    def detail(self, text: str) -> None:
        """Say how far what is going on has come: beside it in the panel, else in a line."""
        if not self.is_live:
            logger.info(text)
            self._print(f"  {text}")
        elif self._phase_name:
            self._phase = self._busy(f"{self._phase_name}  {text}".rstrip())
            self._redraw()

    def _busy(self, text: str) -> RenderableType:
        if self._in_notebook:  # where nothing turns between two drawings
            return Text(text, style="cyan")
        if isinstance(self._phase, Spinner):
            self._phase.update(text=text)  # and turns on
            return self._phase
        return Spinner("line" if self._ascii else "dots", text=text, style="cyan")

    def _redraw(self) -> None:
        """In a notebook; rich draws a terminal's panel by itself."""
        if isinstance(self._live, NotebookOutput):
            self._live.refresh()

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
            self._redraw()
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
        self._print_note(text)

    def advice(self, begun: Sequence[Note], ended: Sequence[Note], current: Sequence[Note]) -> None:
        """Say what the advisor has found. The panel shows what is ``current``, and what has
        ``ended`` goes above it, with all of its steps; in lines each is said when it begins."""
        for note in begun:
            logger.info(note.dated)
        for note in ended:
            logger.info("Over: %s", note.dated)
        lasting = {id(note) for note in current}
        passing = [note for note in begun if id(note) not in lasting]
        for note in [*passing, *ended] if self.is_live else begun:
            self._print_note(note.dated)
        with self._lock:
            self._current = list(current)
        self._redraw()

    def ends_with(self, rows: Sequence[Row]) -> None:
        """The rows of the whole run, for the table that a notebook shows at its end."""
        self._table = metrics_table(rows)

    def _print_note(self, text: str) -> None:
        line = Text.assemble(("note  ", "bold yellow"), plain(text))
        self.console.print(line, soft_wrap=not self.is_live)  # in a log, an entry is a line

    def completions(self, step: int, records: Sequence[Mapping[str, Any]], more: int = 0) -> None:
        """Show sampled completions (records of ``completions/``), group by group. more: how many
        there are besides."""
        if self.is_live:
            self.console.print(completions_table(step, records, more))
            return
        for line in completion_lines(step, records, more):
            self._print(line)

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
            f"tool calls {get('tools/call_frequency')} "
            f"({percent(finite(row.get('tools/failure_frequency')))} failed)"
            if "tools/call_frequency" in row
            else "",
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

    def _panel(self) -> RenderableType:
        console = self.console
        with self._lock:
            view = View(
                step=self.step,
                total_steps=self.total_steps,
                plan_line=self.plan_line,
                row=self._row,
                rewards=list(self._rewards),
                eval_reward=self._eval_reward,
                elapsed=clock(time.monotonic() - self._started),
                left=self._left(),
                pace=self._seconds_per_step(),
                split=self._time_split(),
                notes=[note.dated for note in self._current],
                phase=self._phase,
                ascii=self._ascii,
            )
        # A line is left for the cursor: a panel as high as the terminal would scroll.
        return draw(
            view, min(console.width, WIDEST), None if self._in_notebook else console.height - 1
        )
