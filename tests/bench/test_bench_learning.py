"""bench_learning runs and goes on, its accuracy is that of drawn answers, its curves are read."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_when_a_target_is_reached(load: Any) -> None:
    curves = load("learning_curves")
    runs = [[[0, 0.0, 0.2], [5, 10.0, 0.4], [10, 20.0, 0.3], [15, 30.0, 0.8]]]
    seconds = curves.grid(runs, 301)
    mean = curves.along(runs, seconds).mean(0)
    assert curves.reached(seconds, mean, 0.1) == 0.0
    assert curves.reached(seconds, mean, 0.3) == pytest.approx(5.0)
    assert curves.reached(seconds, mean, 0.55) == pytest.approx(25.0)
    assert math.isinf(curves.reached(seconds, mean, 0.9))
    assert curves.target_of({"off": runs}) == pytest.approx(0.65)


def test_a_curve_is_the_mean_of_seeds_to_the_end_of_the_shortest(load: Any) -> None:
    curves = load("learning_curves")
    runs = [[[0, 0.0, 0.0], [1, 10.0, 1.0]], [[0, 0.0, 0.0], [2, 20.0, 0.0]]]
    seconds = curves.grid(runs, 3)
    np.testing.assert_allclose(seconds, [0, 5, 10])
    np.testing.assert_allclose(curves.along(runs, seconds).mean(0), [0, 0.25, 0.5])


def test_questions_to_train_on_are_not_held_out(load: Any) -> None:
    tasks = load("learning_tasks")
    for task in tasks.TASKS:
        taught = {row["prompt"] for row in tasks.rows(task, held_out=False)}
        asked = tasks.rows(task, held_out=True)
        assert len(asked) == tasks.HELD_OUT
        if task == "two_digit_sums":
            assert not taught & {row["prompt"] for row in asked}


def test_a_first_line_is_right_or_wrong(load: Any) -> None:
    reward = load("learning_tasks").reward
    assert reward([" 37\n1", "37", " 37.", "\n37", "3"], ["37"] * 5) == [1, 1, 0, 0, 0]


class Fixed(torch.nn.Module):
    """Says after each token what comes next, with probability 1/2 and else anything."""

    def __init__(self, following: dict[int, int], size: int):
        super().__init__()
        self.following, self.size = following, size

    def forward(self, input_ids: Any, attention_mask: Any, logits_to_keep: int) -> Any:
        logits = torch.zeros(*input_ids.shape, self.size)
        for at in np.ndindex(*input_ids.shape):
            if (following := self.following.get(int(input_ids[at]))) is not None:
                logits[at][following] = math.log(self.size - 1)  # one half
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


class Letters:
    """A tokenizer of one token a character."""

    known = "\n 0123456789="
    eos_token_id = 0

    def __len__(self) -> int:
        return len(self.known)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [self.known.index(c) for c in text]}

    def batch_decode(self, ids: list[list[int]]) -> list[str]:
        return ["".join(self.known[i] for i in row) for row in ids]


def test_accuracy_is_the_probability_of_a_right_line(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load("learning_tasks")
    known = Letters.known.index
    model = Fixed({known("="): known(" "), known(" "): known("7"), known("7"): 0}, len(Letters()))
    asked = [{"prompt": "3=", "answer": "7"}, {"prompt": "12=", "answer": "77"}]
    monkeypatch.setattr(tasks, "rows", lambda task, held_out: asked)
    drawn, likely = tasks.accuracy(model, Letters(), "any")
    # " 7" and the end of the line, each 1/2; of " 77" the second 7 is one of the other twelve.
    assert drawn == pytest.approx((1 / 8 + 1 / 2 * 1 / 2 * 1 / 24 * 1 / 2) / 2)
    assert likely == 0.5


@pytest.mark.slow
def test_it_runs_and_goes_on(tmp_path: Path) -> None:
    file, figure = tmp_path / "rows.jsonl", tmp_path / "curves.png"

    def run(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(BENCH.parent)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    for kinds in ("off", "off,both"):
        run(
            *(str(BENCH / "bench_learning.py"), "--quick", "--tasks", "gcd", "--kinds", kinds),
            *("--seeds", "1", "--threads", "1", "--json", str(file)),
        )
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["off", "both"]
    looks = rows[0]["value"]["looks"]
    assert looks[0][:2] == [0, 0.0] and looks[-1][1] >= 0.2
    assert rows[1]["value"]["looks"][0] == looks[0]
    run(str(BENCH / "learning_curves.py"), str(file), "--figure", str(figure))
    assert figure.stat().st_size > 1000
