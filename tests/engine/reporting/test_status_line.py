"""The line of a terminal that is overwritten leaves nothing behind and tears nothing apart."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from fusedgrpo.engine.reporting.display import Display
from fusedgrpo.engine.reporting.rollout_line import rollout_progress
from fusedgrpo.engine.reporting.status_line import StatusLine


class Screen(io.StringIO):
    """A terminal: ``lines`` are what one sees."""

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        rows, column = [""], 0
        text = self.getvalue()
        while text:
            if text.startswith("\x1b[K"):
                rows[-1], text = rows[-1][:column], text[3:]
                continue
            character, text = text[0], text[1:]
            if character == "\n":
                rows.append("")
                column = 0
            elif character == "\r":
                column = 0
            else:
                rows[-1] = rows[-1][:column] + character + rows[-1][column + 1 :]
                column += 1
        return rows


def test_each_text_takes_the_place_of_the_one_before():
    screen = Screen()
    line = StatusLine(screen)
    line.show("a long first text")
    line.show("a short one")
    assert screen.lines == ["a short one"]
    line.show("")
    assert screen.lines == [""]


def test_others_have_the_line_to_themselves():
    screen = Screen()
    line = StatusLine(screen)
    handler = logging.StreamHandler(screen)
    handler.setFormatter(logging.Formatter("WARNING %(message)s"))
    line.show("sampling: 10 tokens, 2 live")
    handler.emit(logging.makeLogRecord({"msg": "short"}))
    assert screen.lines == ["WARNING short", ""]
    line.show("sampling: 12 tokens, 2 live")
    print("half", end="", file=screen)
    line.show("sampling: 14 tokens, 2 live")
    assert screen.lines == ["WARNING short", "half"], "a line that is not finished stays"
    print(" and half", file=screen)
    line.show("sampling: 16 tokens, 2 live")
    assert screen.lines == ["WARNING short", "half and half", "sampling: 16 tokens, 2 live"]
    line.show("")
    print("done", file=screen)
    assert screen.lines == ["WARNING short", "half and half", "done", ""]


def test_the_stream_is_as_it_was_afterwards():
    screen = Screen()
    line = StatusLine(screen)
    line.show("")
    line.show("text")
    assert "write" in vars(screen)
    line.show("")
    line.show("")
    assert "write" not in vars(screen)
    written = []
    screen.write = written.append
    line.show("text")
    line.show("")
    screen.write("more")
    assert written[-1] == "more"


def test_a_line_that_is_too_long_is_cut(monkeypatch):
    screen = Screen()
    StatusLine(screen).show("x" * 300)
    assert screen.lines == ["x" * 79]


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_without_a_panel_the_line_is_on_standard_error_if_that_is_a_terminal(
    monkeypatch, caplog, terminal
):
    screen, out = Screen(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", terminal)
    progress = rollout_progress(Display(5, plan_line="plan", console=Console(file=out)))
    ticks = iter([0.0, 40.0, 41.0])
    progress._clock = ticks.__next__
    with caplog.at_level(logging.INFO, "fusedgrpo"), progress() as report:
        report(1200, 3, 1)
        text = "sampling: 1,200 tokens, 3 live, 1 waiting, 30 tokens/s"
        if terminal == "xterm":
            assert screen.lines == [text] and out.getvalue() == "" and not caplog.messages
        else:
            assert out.getvalue() == f"  {text}\n" and caplog.messages == [text]
    assert screen.lines == [""]


def test_a_panel_shows_it_beside_the_phase(monkeypatch):
    screen, out = Screen(), Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    console = Console(file=out, force_terminal=True, force_interactive=True, width=80)
    display = Display(5, plan_line="plan", console=console)
    display.detail("before there is a phase")
    display.phase("sample")
    progress = rollout_progress(display)
    ticks = iter([0.0, 40.0])
    progress._clock = ticks.__next__

    def panel():
        with console.capture() as capture:
            console.print(display._panel())
        return capture.get()

    with progress() as report:
        report(1200, 3, 1)
        assert "sample  sampling: 1,200 tokens, 3 live, 1 waiting, 30 tokens/s" in panel()
    assert "sampling" not in panel() and "sample" in panel()
    assert screen.getvalue() == out.getvalue() == ""
