"""Importing, reading and loading are shown, one after the other, until a run has its panel."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fusedgrpo import stages
from fusedgrpo.engine.reporting.formatting import clock as as_clock
from fusedgrpo.engine.reporting.formatting import printable
from fusedgrpo.engine.reporting.notebook import NotebookOutput
from fusedgrpo.engine.reporting.status_line import StatusLine
from fusedgrpo.engine.reporting.terminal import forgiving, is_notebook, overwrites

# Seconds of a stage until its count is shown, and from there to the next time.
OVERWRITTEN = (0.5, 0.1)
LOGGED = (3.0, 10.0)
MOST_WIDTH = 100


class Line(Protocol):
    def draw(self, console: Console, content: RenderableType) -> None: ...
    def show(self, text: str) -> None: ...


class OnALine:
    """Stages on a line that is overwritten, with a bar where they are counted.

    line: a ``StatusLine``, or what shows in a notebook. console: draws for it.
    """

    def __init__(self, line: Line, console: Console, clock: Callable[[], float] = time.monotonic):
        self._line = line
        self._console = console
        self._clock = clock
        self._what = ""
        self._due = 0.0

    def begin(self, what: str, counted: bool) -> None:
        self._what = what
        self._due = self._clock() + OVERWRITTEN[0]
        self._line.draw(self._console, Text(f"{printable(what)} ...", style="cyan", no_wrap=True))

    def at(self, done: int, total: int | None, unit: str) -> None:
        now = self._clock()
        if now < self._due or not self._what:
            return
        self._due = now + OVERWRITTEN[1]
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=total, completed=done) if total else Text()
        row.add_row(
            Text(printable(self._what), style="cyan"), bar, counted_so_far(done, total, unit)
        )
        self._line.draw(self._console, row)

    def end(self) -> None:
        self._what = ""
        self._line.show("")


class InLines:
    """Stages in a log: a line when one begins, or, where it counts, when it has taken long, and
    from there now and then."""

    def __init__(self, write: Callable[[str], Any], clock: Callable[[], float] = time.monotonic):
        self._write = write
        self._clock = clock
        self._what = ""
        self._due = 0.0

    def begin(self, what: str, counted: bool) -> None:
        self._what = what
        self._due = self._clock() + LOGGED[0]
        if not counted:
            self._write(f"  {printable(what)} ...\n")

    def at(self, done: int, total: int | None, unit: str) -> None:
        now = self._clock()
        if now < self._due or not (self._what and done):
            return
        self._due = now + LOGGED[1]
        self._write(f"  {printable(self._what)}: {counted_so_far(done, total, unit)}\n")

    def end(self) -> None:
        self._what = ""


class NotebookLine:
    """A ``StatusLine`` for a notebook: one output, in which the last line stays."""

    def __init__(self, width: int):
        self._content: RenderableType = ""
        self._output = NotebookOutput(lambda: self._content, width)
        self._started = time.monotonic()

    def draw(self, console: Console, content: RenderableType) -> None:
        self._content = content
        self._output.refresh(now=not isinstance(content, Table))

    def show(self, text: str) -> None:
        """At the end of a stage; the next one takes its place."""

    def close(self) -> None:
        seconds = time.monotonic() - self._started
        self._content = Text(f"ready after {as_clock(seconds)}", style="dim")
        self._output.stop()


def counted_so_far(done: int, total: int | None, unit: str) -> str:
    return f"{done:,} of {total:,} {unit}" if total is not None else f"{done:,} {unit}"


@contextmanager
def opening(*, bars: bool = True) -> Iterator[None]:
    """Inside, the stages of the main process are shown on standard error, or in the notebook that
    this is, unless somebody does that already. bars: False for lines in a terminal as well."""
    elsewhere = stages.are_shown() or os.environ.get("RANK", "0") != "0"
    if elsewhere or sys.stderr is None:
        yield
        return
    stream = forgiving(sys.stderr, "Standard error")
    console = Console(file=stream, highlight=False)
    listener: stages.Listener = InLines(stream.write)
    if bars and is_notebook(console):
        line = NotebookLine(min(console.width, MOST_WIDTH))
        with stages.listening(OnALine(line, console)):
            yield
        line.close()
        return
    if bars and overwrites(console):
        listener = OnALine(StatusLine(stream), console)
    with stages.listening(listener):
        yield
