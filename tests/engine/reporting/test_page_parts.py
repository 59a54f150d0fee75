"""Pictures of completions, coloured tokens and the header of a page."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fusedgrpo.engine.reporting.completions_reader import Scores, scores_from
from fusedgrpo.engine.reporting.page.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Figure,
    _ticks,
    completion_figures,
)
from fusedgrpo.engine.reporting.page.header import bound_line, described, memory_table
from fusedgrpo.engine.reporting.page.tokens import MOST_TOKENS, coloured


def scores(rewards: list[list[float | None]], lengths: int = 5) -> Scores:
    """A rollout of one group for each list."""
    return scores_from(
        {"step": step, "group": 0, "row": step, "reward": reward, "length": lengths + i,
         "rewards": {"a": reward}}
        for step, group in enumerate(rewards, 1) for i, reward in enumerate(group)
    )  # fmt: skip


def by_title(of: Scores, rows: Any = ()) -> dict[str, Figure]:
    return {figure.title: figure for figure in completion_figures(of, rows)}


def test_cells_and_bars_say_what_they_are_of() -> None:
    found = by_title(scores([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [None] * 4]))
    spread = [m.title for m in found["How rewards are spread"].marks if m.kind == "rect"]
    assert spread == [
        "step 1: 3 completions (75%) with reward 0.00",
        "step 1: 1 completion (25%) with reward 1.00",
        "step 2: 4 completions (100%) with reward 1.00",
        "step 3: 4 completions (100%) with reward 0.00",
    ]
    signal = found["Groups with something to learn from"]
    bars = {m.title.split(": ")[0]: m.title.rpartition(", ")[2] for m in signal.marks if m.title}
    assert bars == {
        "step 1": "rewards differ: something to learn from",
        "step 2": "all have the greatest reward",
        "step 3": "all have one that is less",
        "step 4": "none has a reward",
    }
    assert len(signal.legend) == 4


def test_marks_lie_inside_their_axes() -> None:
    draw = np.random.default_rng(0)
    groups = [list(draw.normal(-100, 400, 8)) for _ in range(90)]
    rows = [{"step": i, "kl": i * 0.01, "reward": i % 7} for i in range(1, 91)]
    found = completion_figures(scores(groups), rows)
    assert len(found) == 4
    for figure in found:
        for mark in figure.marks:
            place = {key: float(mark.attributes[key]) for key in ("x", "y", "cx", "cy", "width",
                     "height") if key in mark.attributes}  # fmt: skip
            if mark.kind == "rect":
                assert (
                    LEFT - 0.1 <= place["x"] <= place["x"] + place["width"] <= WIDTH - RIGHT + 0.2
                )
                assert TOP - 0.1 <= place["y"] <= place["y"] + place["height"] <= (
                    HEIGHT - BOTTOM + 0.2)  # fmt: skip
            if mark.kind == "circle":
                assert LEFT <= place["cx"] <= WIDTH and 0 <= place["cy"] <= HEIGHT - BOTTOM


@pytest.mark.parametrize("rewards", [[], [[None, None]], [[1.0]], [[2.0, 2.0], [2.0, 2.0]]])
def test_little_to_draw(rewards: list[list[float | None]]) -> None:
    found = by_title(scores(rewards), [{"step": 1, "reward": 1.0, "kl": 0.0}])
    assert ("How rewards are spread" in found) == any(r is not None for g in rewards for r in g)
    assert "What the distance from the reference bought" not in found


def test_ticks_are_round_and_few() -> None:
    assert _ticks(0, 120, 6) == [0, 20, 40, 60, 80, 100, 120]
    assert _ticks(1, 61, 6) == [10, 20, 30, 40, 50, 60]
    assert _ticks(-0.03, 1.03, 5) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    for low, high in ((1e-9, 3e-9), (-7e5, 1e5), (0.999, 1.001)):
        found = _ticks(low, high, 5)
        assert 2 <= len(found) <= 6 and low <= min(found) and max(found) <= high + abs(high) * 1e-9


def record(advantage: float, before: list[float | None], after: list[float | None]) -> dict:
    tokens = [f"t{i}\n" for i in range(len(after))]
    return {"prompt": "p", "tokens": tokens, "before": before, "after": after,
            "advantage": advantage, "reward": 1.0}  # fmt: skip


def test_tokens_are_coloured_by_what_the_update_did() -> None:
    drift = {
        1: [
            record(0.5, [-1, -1, -1, None], [-0.5, -1.5, -1, -1]),
            record(-2.0, [-1, -1], [-2, -1.005]),
        ],
        5: [{**record(1.0, [], []), "before": None}],
        7: [record(0.0, [-1.0], [-2.0])],
        9: [record(1.0, [-1.0] * 700, [-1.0] * 600 + [-0.5] * 100)],
    }
    (first, second), (last, thousand) = coloured(drift)
    assert (first, last) == (1, 9)
    strong, weak = second
    assert strong.words == "reward 1.00, advantage -2.00"
    # Pushed down, as its advantage asks; and by the scale of the strongest hardly at all.
    assert [token.kind for token in strong.tokens] == ["up3", ""]
    assert [token.kind for token in weak.tokens] == ["up3", "down3", "", ""]
    assert "log-prob -1 before, -0.5 after; x advantage: +0.25" in weak.tokens[0].title
    assert "?" in weak.tokens[3].title
    (flat,) = thousand
    assert len(flat.tokens) == MOST_TOKENS and flat.more == 100
    assert {token.kind for token in flat.tokens} == {""}
    assert coloured({}) == []


def test_tokens_that_the_policy_did_not_write_are_told_apart() -> None:
    talk = record(1.0, [-1, None, None, -1], [-0.5, None, None, -0.5])
    ((_, (shown,)),) = coloured({1: [{**talk, "given": [[1, 3]]}]})
    assert [token.kind for token in shown.tokens] == ["up3", "given", "given", "up3"]
    for nonsense in (None, "x", [[1]], [[0, "2"]], [3]):
        ((_, (shown,)),) = coloured({1: [{**talk, "given": nonsense}]})
        assert [token.kind for token in shown.tokens] == ["up3", "", "", "up3"]


FACTS: dict[str, Any] = {
    "total_steps": 100,
    "sessions": [
        {"started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T04:00:00+00:00",
         "how": "interrupted"},
        {"started": "2026-01-02T05:00:00+00:00", "ended": None, "how": None, "command": "train x",
         "versions": {"torch": "2.13", "python": "3.11"},
         "machine": {"gpu": "H200", "gpu_memory": 140 * 2**30, "cpu": "EPYC", "threads": 8,
                     "memory": 64 * 2**30, "processes": 2, "precision": "bfloat16",
                     "platform": "Linux"}},
    ],
    "model": {"name": "Qwen/Q-7B", "architecture": "Qwen2", "parameters": 7.6e9, "trainable": 4e7,
              "dtype": "bfloat16", "quantisation": {"method": "bitsandbytes", "bits": 4,
                                                    "kind": "nf4"}},
    "adapter": {"type": "LORA", "r": 16, "alpha": 32, "modules": 196, "target_modules": ["q", "k"]},
    "data": {"source": "gsm8k", "rows": 7000, "skipped": 3, "held_out": {"": 50},
             "longest_prompt": 300},
    "batch": {"prompts_per_step": 4, "generations": 8, "prompts_per_rollout": 8, "iterations": 2,
              "tokens_per_microbatch": 4096},
    "attention": "varlen", "kernels": "triton",
    "memory": {"plan": {"phases": {"rollout": 9e9, "update": 12e9}}, "measured": {"update": 11e9}},
}  # fmt: skip


def test_the_header_says_what_the_run_is() -> None:
    found = dict(described(FACTS, [{"step": 40}]))
    assert found["When"] == (
        "2026-01-02 03:04 to 2026-01-02 04:00 (interrupted); since 2026-01-02 05:00 "
        "(running or killed)"
    )
    assert found["Steps"] == "40 of 100"
    assert found["Model"] == "Qwen/Q-7B, Qwen2, 7.6 B parameters, weights in 4 bits (nf4)"
    assert found["Trained"] == "LORA, r 16, alpha 32, on 196 layers (q, k): 40 M weights"
    assert "7000 prompts, 3 rows left out, 50 held out" in found["Data"]
    assert "4 prompts x 8 completions a step" in found["Batch"] and "2 passes" in found["Batch"]
    assert found["Hardware"].startswith("H200 (140 GiB), EPYC, 8 threads, 64 GiB, 2 processes")
    assert found["Versions"] == "torch 2.13, python 3.11"
    assert memory_table(FACTS) == [["rollout", "9.00", "-"], ["update", "12.00", "11.00"]]


def test_the_share_of_the_bound_is_said_or_why_there_is_none() -> None:
    card = {"name": "H200", "flops": 989.5e12, "bandwidth": 4.8e12, "unknown": None}
    line = bound_line({"roofline": card}, {"sample": 0.123, "update": 0.4})
    assert "(H200, by its data sheet 990 TFLOP/s in 16 bit and 4,800 GB/s)" in line
    assert ": sample 12%, update 40%." in line
    assert bound_line({"roofline": card}, {}) == ""
    no_card = {**dict.fromkeys(card), "unknown": "the speed of NVIDIA X is not known"}
    said = bound_line({"roofline": no_card}, {})
    assert said.endswith("is not said: the speed of NVIDIA X is not known.")
    assert bound_line({"roofline": dict.fromkeys(card)}, {"sample": 0.5}) == ""  # on a CPU


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"sessions": "no", "model": 3, "memory": {"plan": None}, "roofline": 3},
        {"sessions": [None], "roofline": {"flops": "many"}},
    ],
)
def test_a_torn_or_foreign_file_says_nothing(facts: dict[str, Any]) -> None:
    assert described(facts, [{"step": 1}]) == [] and memory_table(facts) == []
    assert bound_line(facts, {"sample": 0.5}) == ""
