"""Prompts by what is known of them: shares, floors, coverage, curricula, resume."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fusedgrpo import Callback, GRPOConfig, GRPOTrainer
from fusedgrpo.engine.data.dataset import load_prompts
from fusedgrpo.engine.data.selection import (
    FLOOR,
    STARVED,
    SelectedStream,
    find_selection,
    informative,
)
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError, DataError

COUNT = 20
ROWS = [{"prompt": f"w{4 + i}", "difficulty": (i * 7) % COUNT} for i in range(COUNT)]


def stream(option: str = "informative", rows: Any = None, folder: Path = Path()) -> SelectedStream:
    data = load_prompts(ROWS if rows is None else rows, GRPOConfig(use_cpu=True), tiny.tokenizer(),
                        vocab_size=tiny.VOCAB, context_length=4096)  # fmt: skip
    weigh = find_selection(option, data, [folder])
    return SelectedStream(data, seed=3, weigh=weigh, keeps_up=option == "informative")


def drawn(of: SelectedStream, rollouts: int, rewards: Any, count: int = 5) -> list[list[int]]:
    """The rows of so many rollouts; ``rewards(row)`` is what a group gets."""
    found = []
    for _ in range(rollouts):
        examples = of.peek(count)
        assert [e.row for e in of.peek(2)] == [e.row for e in examples[:2]]
        of.observe(examples, np.asarray([rewards(e.row) for e in examples], dtype=float))
        of.cursor += count
        found.append([e.row for e in examples])
    return found


def test_what_teaches_comes_often_and_nothing_is_left_out() -> None:
    rollouts = drawn(stream(), STARVED * COUNT // 5 + 4, lambda row: [0, 1])
    assert {row for rollout in rollouts for row in rollout} == set(range(COUNT))
    of = stream()
    teaches = {2, 5, 11, 17}
    rollouts = drawn(of, 400, lambda row: [0, 1, 1, 0] if row in teaches else [1, 1, 1, 1])
    count = Counter(row for rollout in rollouts[20:] for row in rollout)
    often = min(count[row] for row in teaches)
    seldom = [count[row] for row in range(COUNT) if row not in teaches]
    assert often > 3 * sum(seldom) / len(seldom) and min(seldom) > 0
    waits = {
        row: [i for i, rollout in enumerate(rollouts) if row in rollout] for row in range(COUNT)
    }
    longest = max(b - a for places in waits.values() for a, b in itertools.pairwise(places))
    assert longest * 5 <= STARVED * COUNT + 5 * COUNT
    assert all(len(set(rollout)) == 5 for rollout in rollouts)
    metrics = of.metrics()
    assert metrics["selection/seen"] == 1 and 0.3 < metrics["selection/coverage"] < 1


def test_weights_have_a_floor() -> None:
    of = stream()
    drawn(of, 8, lambda row: [0, 1] if row == 3 else [1, 1])
    weights = informative(of.known, 0.0)
    assert weights[3] == 1 and all(weights[:3] > FLOOR) and all(weights[:3] < 1.6 * FLOOR)
    of = stream()
    drawn(of, 2, lambda row: [np.nan, np.nan])
    tried = of.known.last >= 0
    assert sum(tried) == 10 and set(informative(of.known, 0.0)[tried]) == {FLOOR}
    of = stream()
    drawn(of, 8, lambda row: [1, 1])
    assert set(informative(of.known, 0.0)) == {FLOOR}  # nobody promises anything


def test_one_group_says_little() -> None:
    """Where most teach, what once did not comes less often; where few do, it comes seldom."""
    shares = {}
    for teaching in (3, 15):
        of = stream()
        for place in range(COUNT):
            of.known.add(place, 0, np.asarray([0, 1] if place < teaching else [1, 1], dtype=float))
        weights = informative(of.known, 0.0)
        assert (weights[:teaching] == 1).all()
        shares[teaching] = weights[-1]
    # Of 20 spreads of 0.5, 15 or 3: (2 x 0.375) / (2 x 0.375 + 0.5) and (2 x 0.075) / (...).
    assert shares[15] == pytest.approx(FLOOR + (1 - FLOOR) * 0.6)
    assert shares[3] == pytest.approx(FLOOR + (1 - FLOOR) * 0.15 / 0.65)


def test_a_prompt_that_waits_comes_first() -> None:
    of = stream()
    drawn(of, 4, lambda row: [1, 1])
    of.known.last[:] = of.cursor - 1
    of.known.last[[4, 9]] = of.cursor - STARVED * COUNT - np.array([2, 1])
    assert [e.row for e in of.peek(2)] == [4, 9]
    of.known.last[:] = -1  # all have waited as long: what is drawn comes first
    of.cursor += STARVED * COUNT
    assert [e.row for e in of.peek(COUNT)] != list(range(COUNT))


def test_more_prompts_than_there_are() -> None:
    rows = [e.row for e in stream().peek(2 * COUNT + 3)]
    assert sorted(rows[:COUNT]) == sorted(rows[COUNT : 2 * COUNT]) == list(range(COUNT))


def test_groups_without_rewards_and_running_means() -> None:
    of = stream()
    (first, *_) = of.peek(1)
    for rewards in ([np.nan, np.nan], [0, 1], [1, 1]):
        of.known.add(first.row, 0, np.asarray(rewards, dtype=float))
    assert of.known.seen[first.row] == 2
    assert of.known.mean[first.row] == pytest.approx(0.5 + 0.3 * 0.5)
    assert of.known.spread[first.row] == pytest.approx(0.5 * 0.7)
    again = stream()
    again.restore(json.loads(json.dumps(of.state())))
    for name in ("seen", "mean", "spread", "last"):
        assert (getattr(again.known, name) == getattr(of.known, name)).all()
    other = stream(rows=[*ROWS[: first.row + 1], {"prompt": "w30"}])
    for state in (of.state(), None):  # other prompts, and a version before
        other.known.seen[0] = 3
        other.restore(state)
        assert not other.known.seen.any() and (other.known.last == -1).all()


def test_a_curriculum_opens() -> None:
    of = stream("column:difficulty")
    for share, most in ((0.0, 4), (0.25, 12), (0.5, 20), (1.0, 20)):
        of.share, of.cursor = share, of.cursor + 1
        difficulties = {ROWS[e.row]["difficulty"] for e in of.peek(most)}
        assert difficulties == set(range(most))
    numbers = [np.float32(0.5), np.int64(3), 1]
    of = stream("column:d", [{"prompt": f"w{4 + i}", "d": d} for i, d in enumerate(numbers)])
    assert [e.row for e in of.peek(1)] == [0]
    with pytest.raises(DataError, match="row 0 has True"):
        stream("column:d", [{"prompt": "w4", "d": True}])
    with pytest.raises(DataError, match="column 'x' of row 0 has None"):
        stream("column:x")
    with pytest.raises(DataError, match="row 1 has 'hard'"):
        stream("column:d", [{"prompt": "w4", "d": 1}, {"prompt": "w5", "d": "hard"}])


def test_weights_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "def easy(rows, seen, mean, spread, progress):\n"
        "    assert np.isnan(mean[seen == 0]).all()\n"
        "    return [row['difficulty'] < 5 for row in rows]\n"
        "def lots(rows, **known):\n    return np.random.random(len(rows)) < 0.3\n"
        "def wrong(**known):\n    return [1.0]\n"
        "def fails(**known):\n    raise ValueError('no')\n"
    )
    of = stream("mine.py:easy", folder=tmp_path)
    assert {ROWS[e.row]["difficulty"] for e in of.peek(12)} == set(range(5))
    ours, theirs = (stream("mine.py:lots", folder=tmp_path) for _ in range(2))
    rows = [e.row for e in ours.peek(COUNT)]
    np.random.random()
    assert [e.row for e in theirs.peek(COUNT)] == rows
    for name, words in (("wrong", "a weight >= 0 for each of the 20"), ("fails", "ValueError: no")):
        with pytest.raises(ConfigError, match=words):
            stream(f"mine.py:{name}", folder=tmp_path).peek(1)
    with pytest.raises(ConfigError, match="prompt_selection"):
        GRPOConfig(use_cpu=True, prompt_selection="informativ")
    with pytest.raises(ConfigError, match="shuffle_dataset"):
        GRPOConfig(use_cpu=True, prompt_selection="informative", shuffle_dataset=False)


def test_wrong_weights_are_said_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def wrong(**known):\n    return [1.0]\n")
    args = GRPOConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, num_generations=2,
        max_completion_length=4, prompt_selection="mine.py:wrong",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="a weight >= 0 for each of the 20"):
        GRPOTrainer(
            tiny.model(), lambda completions, **_: [0.0] * len(completions), args, ROWS,
            processing_class=tiny.tokenizer(), search_paths=[tmp_path],
        )  # fmt: skip


def test_a_run_that_was_stopped_draws_the_same(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class StopsAt(Callback):
        def on_step(self, row: dict[str, Any]) -> None:
            if row["step"] == 5:
                raise Stop

    def some(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float]:
        return [sum(i) * (p > "w15") / 40 for i, p in zip(completion_ids, prompts, strict=True)]

    def make(path: Path, callbacks: Any = None) -> GRPOTrainer:
        args = GRPOConfig(
            output_dir=str(path), use_cpu=True, bf16=False, num_generations=2, max_steps=9,
            prompts_per_step=4, max_completion_length=4, lora_r=4, save_strategy="no",
            generation_batch_size=16, prompt_selection="informative", dynamic_sampling=True,
        )  # fmt: skip
        return GRPOTrainer(
            tiny.model(), some, args, ROWS, processing_class=tiny.tokenizer(), callbacks=callbacks
        )

    def rows(path: Path) -> list[dict[str, Any]]:
        clock = ("time/", "step_time", "tokens_per_second", "memory/")
        found = read_metrics(path / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in found]

    whole = make(tmp_path / "whole")
    whole.train()
    with pytest.raises(Stop):
        make(tmp_path / "cut", [StopsAt()]).train()
    again = make(tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert {"selection/coverage", "selection/seen"} <= rows(tmp_path / "cut")[0].keys()
    for (_, a), (_, b) in zip(whole.policy.trainable(), again.policy.trainable(), strict=True):
        assert torch.equal(a, b)
