"""The page of a run that goes on: when it is written, and what becomes of failures."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny

from fusedgrpo import Callback, GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting import live_report
from fusedgrpo.engine.reporting.live_report import FIRST, PAUSE, SHARE, LiveReport
from fusedgrpo.errors import OutputDirError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rows(path: Path, count: int = 3) -> None:
    lines = (json.dumps({"step": i, "reward": 0.5}) + "\n" for i in range(1, count + 1))
    (path / "metrics.jsonl").write_text("".join(lines))


def test_it_is_written_now_and_then_and_takes_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = Clock(), []

    def slow(*args: object, live: bool, pictures: bool) -> None:
        assert live and not pictures
        written.append(clock.now)
        clock.now += 3.0

    monkeypatch.setattr(live_report, "write_report", slow)
    live = LiveReport(tmp_path, tmp_path / "report.html", clock)
    (tmp_path / "metrics.jsonl").touch()
    clock.now = FIRST
    live.after_step()
    assert written == []  # the first step takes long
    clock.now = 0.0
    rows(tmp_path)
    for _ in range(1000):
        live.after_step()
        clock.now += 1.0
    assert written[0] == FIRST
    assert all(b - a >= 3.0 / SHARE for a, b in itertools.pairwise(written))
    assert len(written) == 4

    monkeypatch.setattr(
        live_report, "write_report", lambda *a, live, pictures: written.append(clock.now)
    )
    clock.now += 3.0 / SHARE
    live.after_step()
    clock.now += PAUSE - 1
    live.after_step()
    assert len(written) == 5
    clock.now += 1
    live.after_step()
    assert len(written) == 6


def test_the_last_page_does_not_load_itself_again(tmp_path: Path) -> None:
    clock = Clock()
    live = LiveReport(tmp_path, tmp_path / "report.html", clock)
    live.last()
    assert not (tmp_path / "report.html").exists()  # there was no step yet
    rows(tmp_path)
    clock.now = FIRST
    live.after_step()
    assert "data-live" in (tmp_path / "report.html").read_text()
    live.last()
    assert "data-live=" not in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    live = LiveReport(tmp_path, tmp_path / "not there" / "report.html", clock)
    rows(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            clock.now += FIRST + PAUSE
            live.after_step()
    assert len(caplog.records) == 1 and "The run goes on" in caplog.text


def test_the_page_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    """A run whose directory was replaced ends with an error, and writes nothing there."""
    where = tmp_path / "run"

    class Replaced(Callback):
        def on_step(self, row: Mapping[str, Any]) -> None:
            if not (tmp_path / "old").exists():
                where.rename(tmp_path / "old")
                where.mkdir()
                rows(where)
                (where / "report.html").write_text("theirs")

    args = GRPOConfig(
        output_dir=str(where), use_cpu=True, bf16=False, num_generations=2, max_steps=3,
        prompts_per_step=1, max_completion_length=3, lora_r=4, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        tiny.model(), lambda completions, **_: [0.0] * len(completions), args, [{"prompt": "w4"}],
        processing_class=tiny.tokenizer(), callbacks=[Replaced()],
    )  # fmt: skip
    with pytest.raises(OutputDirError):
        trainer.train()
    assert (where / "report.html").read_text() == "theirs"
