"""Advantage estimators by name, ours and the user's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.advantages import ESTIMATORS, find_estimator
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.errors import ConfigError, NonFiniteError, RewardError

FILE = """
import torch

def leave_one_out(total, group_ids, **_):
    found = torch.zeros_like(total)
    for group in group_ids.unique():
        own = group_ids == group
        n = own.sum()
        found[own] = (total[own] - total[own].mean()) * n / (n - 1)
    return found

def as_given(total, **_):
    return total.nan_to_num(0)

def listed(rewards, weights, **_):
    return [1, 2, 3, 4]

def short(total, **_):
    return total[:-1]

def nan(total, **_):
    return total * float("nan")

def failing(total, **_):
    raise ZeroDivisionError("no reason")

def changes_its_arguments(rewards, total, group_ids, weights):
    for x in (rewards, total, group_ids, weights):
        x.zero_()
    return torch.ones(4)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "advantages.py").write_text(FILE)
    return tmp_path


REWARDS = RewardBatch(
    values=torch.tensor([[1.0, 2.0], [0.0, 2.0], [1.0, math.nan], [math.nan, math.nan]]),
    total=torch.tensor([3.0, 2.0, 1.0, math.nan]),
    seconds={},
    extra={},
    metrics={},
    dropped=0,
)
GROUPS = torch.tensor([0, 0, 1, 1])


def estimate(name: str, folder: Path) -> torch.Tensor:
    found = find_estimator(GRPOConfig(advantage_estimator=name), [folder])
    return found(REWARDS, GROUPS, torch.ones(2))


def test_every_name_has_an_estimator() -> None:
    from fusedgrpo.config.rules import EXTENSIBLE

    assert tuple(ESTIMATORS) == EXTENSIBLE["advantage_estimator"]


def test_one_of_the_user_s(folder: Path) -> None:
    assert estimate("advantages.py:as_given", folder).tolist() == [3.0, 2.0, 1.0, 0.0]
    found = estimate("advantages.py:listed", folder)
    assert found.tolist() == [1, 2, 3, 4] and found.dtype == torch.float32


def test_it_gets_copies(folder: Path) -> None:
    before = REWARDS.values.clone(), REWARDS.total.clone(), GROUPS.clone()
    estimate("advantages.py:changes_its_arguments", folder)
    for was, now in zip(before, (REWARDS.values, REWARDS.total, GROUPS), strict=True):
        torch.testing.assert_close(now, was, equal_nan=True)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("short", RewardError, r"shape \(3,\): expected one advantage for each of the 4"),
        ("nan", NonFiniteError, r"nan for completion 0, whose rewards are \[1.0, 2.0\]"),
        ("failing", RewardError, "raised ZeroDivisionError: no reason"),
        ("missing", ConfigError, "has no 'missing'"),
    ],
)
def test_what_is_none_is_an_error(folder: Path, name: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"advantage_estimator 'advantages.py:{name}'.*{message}"):
        estimate(f"advantages.py:{name}", folder)


def run(folder: Path, name: str, **changes: Any) -> GRPOTrainer:
    options = {
        "num_generations": 4, "prompts_per_step": 2, "max_completion_length": 5, "max_steps": 4,
        "learning_rate": 1e-2, "bf16": False, "use_cpu": True, "save_strategy": "no",
    }  # fmt: skip
    trainer = GRPOTrainer(
        model=tiny.model(),
        args=GRPOConfig(output_dir=str(folder / name), **options | changes),
        train_dataset=[{"prompt": "w4 w5 w6"}, {"prompt": "w7 w8"}, {"prompt": "w9"}],
        tokenizer=tiny.tokenizer(),
        search_paths=[folder],
        **{"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]},
    )
    trainer.train()
    return trainer


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])


def test_a_run_with_leave_one_out_is_one_without_division_scaled(folder: Path) -> None:
    """With groups of 4 it is r - mean times 4/3; AdamW does not see a constant factor."""
    options: dict[str, Any] = {"max_grad_norm": 0.0, "adam_epsilon": 1e-30}
    ours = run(folder, "ours", scale_rewards="none", **options)
    theirs = run(folder, "theirs", advantage_estimator="advantages.py:leave_one_out", **options)
    rows = [read_metrics(folder / name / "metrics.jsonl") for name in ("ours", "theirs")]
    for a, b in zip(*rows, strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"] * 4 / 3, rel=1e-3)
        assert b["reward"] == a["reward"]
    torch.testing.assert_close(weights(theirs), weights(ours), rtol=0, atol=1e-4)


def test_groups_of_equal_rewards_train_where_it_gives_them_an_advantage(folder: Path) -> None:
    """Which completions are left out is decided by the advantages, not by the rewards: all
    log-probs are there that a second pass over the rollout compares with."""
    trainer = GRPOTrainer(
        model=tiny.model(),
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(folder / "run"), num_generations=2, prompts_per_step=2, max_steps=4,
            max_completion_length=4, num_iterations=2, advantage_estimator="advantages.py:as_given",
            bf16=False, save_strategy="no",
        ),
        train_dataset=[{"prompt": "w4 w5 w6"}, {"prompt": "w7 w8"}],
        tokenizer=tiny.tokenizer(),
        search_paths=[folder],
    )  # fmt: skip
    trainer.train()
    for row in read_metrics(folder / "run" / "metrics.jsonl"):
        assert row["frac_rows_skipped"] == 0 and row["frac_reward_zero_std"] == 1
        assert math.isfinite(row["loss"]) and row["grad_norm"] > 0
