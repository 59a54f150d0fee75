from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from fusedgrpo.engine.reporting.advisor import Note
from fusedgrpo.engine.reporting.completions_table import completions_table
from fusedgrpo.engine.reporting.display import Display

ROW = {
    "step": 1,
    "reward": 0.5,
    "reward_std": 0.25,
    "rewards/accuracy/mean": 0.75,
    "rewards/format/mean": 0.125,
    "kl": 0.01,
    "entropy": 1.5,
    "completions/mean_length": 24.0,
    "completions/clipped_ratio": 0.1,
    "loss": -0.002,
    "grad_norm": 0.9,
    "learning_rate": 1e-5,
    "tokens_per_second": 321.0,
    "memory/peak": 2e9,
    "time/sample": 6.0,
    "time/score": 1.0,
    "time/update": 3.0,
}
RECORD = {
    "group": 0,
    "row": 7,
    "prompt": [{"role": "user", "content": "2 + 2"}],
    "completion": "four\n\x1b[2J[red]",
    "finish_reason": "stop",
    "length": 3,
    "rewards": {"accuracy": 1.0, "format": None},
    "reward": 1.0,
    "advantage": 0.7,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def terminal(width: int = 80, height: int = 40) -> Console:
    return Console(
        file=Terminal(),
        force_terminal=True,
        force_interactive=True,
        width=width,
        height=height,
        record=True,
    )


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_a_logged_step_is_one_line_with_everything():
    console = plain()
    with Display(5, plan_line="plan" * 40, logging_steps=10, console=console) as display:
        display.update(1, ROW)
    plan, line = text(console).splitlines()
    assert plan == "plan" * 40
    assert line.startswith("step 1/5  reward 0.500  reward_std 0.250  accuracy 0.750  format 0.125")
    for part in ("kl 0.0100", "entropy 1.50", "length 24.0", "clipped 10%", "loss -0.00200"):
        assert part in line
    for part in ("grad_norm 0.900", "lr 1.0e-05", "321 tok/s", "memory 2.0 GB", "left 0:00"):
        assert part in line
    assert "sample 60% score 10% update 30%" in line
    assert "\x1b" not in line and "tool" not in line


def test_a_line_of_a_run_with_tools_says_how_often_they_are_called():
    console = plain()
    calls = {"tools/call_frequency": 0.875, "tools/failure_frequency": 0.25}
    with Display(5, plan_line="plan", logging_steps=10, console=console) as display:
        display.update(1, ROW | calls)
    assert "clipped 10%  tool calls 0.875 (25% failed)  loss" in text(console)


def test_lines_come_at_the_first_every_logging_and_the_last_step():
    console = plain()
    with Display(7, plan_line="plan", logging_steps=3, console=console) as display:
        for step in range(1, 8):
            display.update(step, {"reward": float(step)})
    lines = text(console).splitlines()[1:]
    assert [line.split()[1] for line in lines] == ["1/7", "3/7", "6/7", "7/7"]


def test_a_line_averages_the_steps_since_the_line_before():
    console = plain()
    with Display(8, plan_line="plan", logging_steps=4, console=console) as display:
        for step in range(1, 5):
            display.update(step, {"reward": float(step), "kl": None})
    assert "reward 3.00" in text(console).splitlines()[-1]


def test_phases_are_said_in_lines_only_until_the_first_step_is_done():
    console = plain()
    with Display(2, plan_line="plan", console=console) as display:
        display.phase("sample")
        display.update(1, ROW)
        display.phase("sample")
    assert text(console).count("sample ...") == 1


def test_a_note_is_said_once_and_logged(caplog):
    caplog.set_level(logging.INFO, logger="fusedgrpo")
    console = plain()
    with Display(2, plan_line="plan", console=console) as display:
        display.note("mind [this]")
        display.note("mind [this]")
    assert text(console).count("mind [this]") == 1
    assert caplog.messages == ["mind [this]"]


def test_the_panel_fits_80_columns_and_shows_all_values():
    console = terminal()
    display = Display(20, plan_line="one prompt x 8 completions", console=console)
    assert display.is_live
    display.update(1, ROW)
    frame = plain()
    frame.print(display._panel())
    lines = text(frame).splitlines()
    assert all(len(line) == 80 for line in lines)
    panel = "\n".join(lines)
    for part in ("1/20", "0.500", "accuracy", "0.750", "format", "reward_std", "clipped_ratio"):
        assert part in panel
    for part in ("grad_norm", "1.0e-05", "tokens/s", "2.0 GB", "sample 60%", "one prompt"):
        assert part in panel


@pytest.mark.parametrize(("width", "height"), [(60, 20), (80, 24), (200, 50), (60, 14)])
@pytest.mark.parametrize("rewards", [1, 9])
def test_the_panel_fits_and_keeps_what_matters(width, height, rewards):
    console = terminal(width, height)
    plan = "2 prompts x 8 completions per step; 500 steps = 2.13 epochs of 469 prompts; " * 2
    display = Display(500, plan_line=plan, console=console)
    names = [f"a_function_with_a_long_name_{i}" for i in range(rewards)]
    row = {key: value for key, value in ROW.items() if not key.startswith("rewards/")}
    row |= {f"rewards/{name}/mean": 0.5 for name in names} | {"eval_reward": 0.25}
    for step in range(1, 30):
        display.update(step, row)
    display.advice([], [], [Note("so many words " * 20, 12, 29)])
    display.phase("sample")
    display.detail("sampling: 123,456 tokens, 16 live, 2,048 waiting, 12,345 tokens/s")
    console.print(display._panel())
    lines = console.export_text().splitlines()
    assert len(lines) < height, "a line is left for the cursor"
    assert {len(line) for line in lines} == {min(width, 100)}
    panel = "\n".join(lines)
    for part in ("step 29/500", "reward ", "0.500", "reward_std", "eval_reward", "mean_length"):
        assert part in panel
    for part in ("clipped_ratio", "grad_norm", "1.0e-05", "tokens/s", "peak memory", "2.0 GB"):
        assert part in panel
    assert "sample 60%" in panel and "sampling: 123,456 tokens" in panel
    assert ("note  steps 12-29: so many words" in panel) is (height > 14)
    assert bool(re.search(r"and \d more", panel)) is (height == 14 and rewards == 9)


def test_the_panel_shows_notes_while_they_are_current_and_says_them_when_they_are_over(caplog):
    caplog.set_level(logging.INFO, logger="fusedgrpo")
    lines = plain()
    for console in (terminal(), lines):
        going, over = Note("all equal", 3, 8), Note("cut off", 1, 4)
        with Display(20, plan_line="plan", console=console) as display:
            display.advice([over, Note("a loss near 0", 2, 2)], [], [over])
            display.advice([going], [over], [going])
            with console.capture() as drawn:
                console.print(display._panel())
            assert ("steps 3-8: all equal" in drawn.get()) and "cut off" not in drawn.get()
    *first, last = [text(lines).split("note  ")[i].split(":")[0] for i in (1, 2, 3)]
    assert first == ["steps 1-4", "step 2"] and last == "steps 3-8"
    assert caplog.messages[-1] == "Over: steps 1-4: cut off"


def test_a_warning_of_a_handler_from_before_comes_out_above_the_panel(monkeypatch):
    console, errors = terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", errors)
    handler = logging.StreamHandler(errors)
    logging.getLogger("some.library").addHandler(handler)
    try:
        with Display(2, plan_line="plan", console=console):
            handler.emit(logging.makeLogRecord({"msg": "mind this"}))
        assert "mind this" in text(console) and errors.getvalue() == ""
        assert handler.stream is errors
    finally:
        logging.getLogger("some.library").removeHandler(handler)


def test_the_panel_of_a_run_that_failed_says_stopped():
    console = terminal()
    with (
        pytest.raises(RuntimeError),
        Display(2, plan_line="plan", console=console),
    ):
        raise RuntimeError
    assert "stopped" in text(console)


def test_force_color_does_not_turn_a_pipe_into_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True)
    assert not Display(1, plan_line="plan", console=console).is_live


def test_missing_values_are_a_dash_and_no_error():
    console = plain()
    with Display(2, plan_line="plan", console=console) as display:
        display.update(1, {"step": 1})
        console.print(display._panel())
    assert "reward -" in text(console)
    assert "not known yet" in text(console)


def test_completions_cannot_drive_the_terminal():
    for show in (
        lambda display: display.completions(3, [RECORD]),
        lambda display: display.console.print(completions_table(3, [RECORD])),
    ):
        console = plain()
        show(Display(2, plan_line="plan", console=console))
        shown = text(console)
        assert "\x1b" not in shown
        assert "[red]" in shown
        assert "user: 2 + 2" in shown
        assert "accuracy 1.00" in shown


def run(script: str, **env: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_characters_the_console_cannot_encode_do_not_end_the_run():
    child = run(
        "from fusedgrpo.engine.reporting.display import Display\n"
        "with Display(1, plan_line='计算') as display: display.note('done')",
        PYTHONIOENCODING="ascii",
    )
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert b"??" in out


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    child = run(
        "from pathlib import Path; from fusedgrpo.engine.reporting.display import Display\n"
        "with Display(9, plan_line='plan', logging_steps=1) as display:\n"
        "    for step in range(1, 10): display.update(step, {'step': step})\n"
        f"Path({str(tmp_path / 'end')!r}).touch()",
    )
    assert child.stdout is not None
    child.stdout.close()
    child.wait()
    assert (tmp_path / "end").exists()
