"""Whole runs on the CUDA twin: GRPOTrainer of every kind, and TRL's trainer on our loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from cuda_twin.process import found

pytestmark = [pytest.mark.slow, pytest.mark.peer]

PRECISION = {
    "lora": "bfloat16",
    "qlora": "bfloat16",
    "full": "bfloat16",
    "memory saved": "bfloat16",
    "whole sequences in float32": "float32",
    "windows with correction": "bfloat16",
    "capability 7.5": "float16",
    "capability 7.5 in float32": "float32",
}
# How far what the sampler says of a token may be from what the policy says of it.
CLOSE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}


@pytest.fixture(scope="module")
def runs() -> dict[str, Any]:
    pytest.importorskip("trl")
    pytest.importorskip("bitsandbytes")
    return found(Path(__file__).parent / "scenarios" / "runs.py")


@pytest.mark.parametrize("kind", PRECISION)
def test_a_run_trains_there(runs, kind):
    told = runs[kind]
    assert told["device"] == "cuda:0"
    assert told["precision"] == PRECISION[kind]
    assert told["layout"] == ("packed" if kind.startswith("whole") else "shared")
    assert told["moved"] and told["finite"]


@pytest.mark.parametrize("kind", PRECISION)
def test_the_sampler_is_the_policy(runs, kind):
    gaps = [
        row["sampling/sampling_logp_difference/max"] for row in runs[kind]["rows"] if "loss" in row
    ]
    assert gaps and max(gaps) <= CLOSE[PRECISION[kind]]


def test_a_window_ends_the_same_from_a_checkpoint_inside_it(runs):
    told = runs["windows with correction"]
    assert told["ends the same"]
    assert [row["step"] for row in told["rows"] if "loss" in row] == [1, 2]
    assert [row["step"] for row in told["rows"] if "eval_reward" in row] == [2]


@pytest.mark.parametrize("fused_rollouts", [False, True])
def test_trl_trains_there_on_our_loss(runs, fused_rollouts):
    told = runs[f"trl, {fused_rollouts}"]
    assert told["device"] in ("cuda", "cuda:0")
    (row,) = told["history"]
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
    assert len(told["losses"]) == 2


@pytest.mark.parametrize("fused_rollouts", [False, True])
def test_what_of_a_loss_in_trl_is_ours_waits_twice(runs, fused_rollouts):
    """For the tokens, which TRL has on the device in padded rows, and for the rows without a
    gradient. TRL itself reads a dozen numbers for its metrics. The first loss tries the model."""
    _, costs = runs[f"trl, {fused_rollouts}"]["losses"]
    ours = {name: n for name, n in costs["waits"].items() if " @ fusedgrpo/" in name}
    assert sum(ours.values()) <= 2, costs["waits"]
    pageable = [name for name in costs["copies"] if name.startswith("pageable to the device")]
    assert not pageable, costs["copies"]
    assert not any(name.startswith("frozen") for name in costs["casts"]), costs["casts"]
