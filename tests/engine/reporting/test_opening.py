"""Until there is a panel, one sees what is going on: on a line, or in a log now and then."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from fusedgrpo import stages
from fusedgrpo.engine.reporting import opening as module
from fusedgrpo.engine.reporting.opening import InLines, OnALine, opening


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Line:
    """A line that is overwritten; ``seen`` is all that it ever showed."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def draw(self, console: Console, content: object) -> None:
        with console.capture() as captured:
            console.print(content)
        self.seen.append(captured.get().rstrip())

    def show(self, text: str) -> None:
        self.seen.append(text)


def work(clock: Clock, seconds: float) -> None:
    with stages.stage("loading the model"):
        pass
    with stages.stage("reading", counted=True):
        for _ in stages.count(range(40), "rows"):
            clock.now += seconds / 40


def test_a_log_gets_a_line_a_stage_and_of_what_is_counted_one_now_and_then():
    clock, said = Clock(), []
    with stages.listening(InLines(said.append, clock)):
        work(clock, 2.0)
    assert said == ["  loading the model ...\n"], "what is read at once is not worth a line"
    said.clear()
    with stages.listening(InLines(said.append, clock)):
        work(clock, 20.0)
    assert said[1:] == ["  reading: 6 of 40 rows\n", "  reading: 26 of 40 rows\n"]


def test_a_terminal_has_a_line_with_a_bar_which_is_gone_after():
    clock, line = Clock(), Line()
    console = Console(file=io.StringIO(), width=60, force_terminal=True, color_system=None)
    with stages.listening(OnALine(line, console, clock)):
        work(clock, 4.0)
    assert line.seen[:3] == ["loading the model ...", "", "reading ..."]
    assert line.seen[-2].startswith("reading  ━━━") and line.seen[-2].endswith("39 of 40 rows")
    assert all(len(text) <= 60 for text in line.seen) and line.seen[-1] == ""


def test_nothing_is_said_where_nobody_listens_and_once_where_two_do():
    assert list(stages.count(iter("abc"), "rows")) == ["a", "b", "c"]
    outer, inner = [], []
    with stages.listening(InLines(outer.append)), stages.listening(InLines(inner.append)):
        work(Clock(), 1.0)
    work(Clock(), 1.0)
    assert len(outer) == 1 and inner == []


@pytest.mark.parametrize(("rank", "said"), [("0", "  loading the model ...\n"), ("1", "")])
def test_only_the_first_process_says_it(monkeypatch, rank, said):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setenv("RANK", rank)
    with opening():
        work(Clock(), 1.0)
    assert sys.stderr.getvalue() == said
    assert module.stages._listener is None
