"""Log-probs before and after updates, read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedgrpo.engine.reporting.completions_log import CompletionsLog
from fusedgrpo.engine.reporting.drift_log import drift_rows, pushes, read_drift, with_measured_kl
from fusedgrpo.engine.reporting.judging.verdict import judge
from fusedgrpo.engine.reporting.metrics_log import MetricsLog
from fusedgrpo.engine.reporting.recorded_run import RecordedRun
from fusedgrpo.kernels import policy_loss
from tests.helpers.synthetic_runs import STEPS, rise, run

LORA = {"finetuning_type": "lora", "learning_rate": 1e-5, "beta": 0.0}


def record(**fields: Any) -> dict[str, Any]:
    return {
        "tokens": ["a", " b", "c"],
        "before": [-1.0, -2.0, -3.0],
        "after": [-0.5, -2.5, -3.0],
        "reference": [-1.5, -2.0, -30.0],
        "advantage": -2.0,
    } | fields


def test_the_kl_is_the_one_that_the_loss_measures() -> None:
    """Over all tokens of a check together, with the loss' limit for a token that is far off."""
    other = record(after=[-4.0, -0.1, -1.0], reference=[-1.0, -0.2, -1.0])
    logp, reference = (
        torch.tensor([value for each in (record(), other) for value in each[name]])
        for name in ("after", "reference")
    )
    loss = policy_loss(
        logp, torch.zeros(2), torch.tensor([0, 3, 6], dtype=torch.int32),
        old_logp=logp, ref_logp=reference, beta=0.1, num_items=6, loss_type="dapo",
    )  # fmt: skip
    (row,) = drift_rows({7: [record(), other], 9: [record(reference=None)]})
    assert row["step"] == 7
    assert row["kl"] == pytest.approx(float(loss.metrics["kl"]), rel=1e-5)


def test_tokens_without_a_value_are_left_out() -> None:
    (row,) = drift_rows({1: [record(after=[None, -2.0, None])]})
    assert row["kl"] == 0.0
    assert drift_rows({1: [record(after=[None] * 3)]}) == []


def test_a_push_is_positive_where_the_update_did_as_it_was_told() -> None:
    assert pushes(record()) == [-1.0, 1.0, 0.0]
    assert pushes(record(advantage=2.0)) == [1.0, -1.0, 0.0]
    one, *others = pushes(record(before=[None, -2.0, -3.0])) or []
    assert math.isnan(one) and others == [1.0, 0.0]
    assert pushes(record(before=None)) is None


def test_measured_kl_is_merged_only_where_the_run_has_none(tmp_path: Path) -> None:
    drift = {2: [record()], 5: [record()]}
    rows: list[dict[str, Any]] = [{"step": step, "reward": 1.0} for step in (1, 2, 3)]
    merged, sampled = with_measured_kl(rows, drift)
    assert sampled and [sorted(row) for row in merged] == [
        ["reward", "step"], ["kl", "reward", "step"], ["reward", "step"],
    ]  # fmt: skip
    assert "kl" not in rows[1]
    assert with_measured_kl(rows, {}) == (rows, False)
    own = [{"step": 1, "kl": 0.1}, {"step": 2, "reward": 0.0}]
    assert with_measured_kl(own, drift) == (own, False)


def written(path: Path, kl: Any, steps: range, *, last_sampled: int = STEPS) -> RecordedRun:
    """A synthetic run without beta whose checks after ``steps`` measure ``kl`` of their share."""
    rows = run(0, rise(0.3, 0.5))
    for row in rows:
        row["time/sample"] = float(row["step"] <= last_sampled)
    with MetricsLog(path / "metrics.jsonl") as log:
        for row in rows:
            log.append(row)
    for step in steps:
        ratio = distance(kl(step / STEPS))
        CompletionsLog(path / "drift").write(
            step, [record(after=[-1.0] * 3, reference=[-1.0 - ratio] * 3)]
        )
    return RecordedRun.read(path)


def distance(kl: float) -> float:
    """The x above 0 with exp(-x) - 1 + x = kl."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.exp(-middle) - 1 + middle < kl else (low, middle)
    return low


@pytest.mark.parametrize("every", [STEPS // 8, STEPS // 2])
def test_a_kl_that_explodes_is_found_where_beta_is_0(tmp_path: Path, every: int) -> None:
    found = written(tmp_path, lambda t: 0.01 * 10 ** (3 * t), range(every, STEPS + 1, every))
    verdict = judge(found.rows, LORA)
    assert found.kl_is_sampled and verdict.kind == "red"
    (reason,) = (finding for finding in verdict.reasons if finding.key == "kl")
    assert reason.steps == (STEPS, STEPS) and "10.0 nats" in reason.text
    assert reason.change == {"beta": 0.01, "learning_rate": 1e-5 / 3}


def test_the_last_check_counts_wherever_it_was(tmp_path: Path) -> None:
    """Of a run that was stopped, or whose last steps did not sample."""
    found = written(tmp_path, lambda t: 8.0 * t, range(15, 91, 15), last_sampled=60)
    (reason,) = (f for f in judge(found.rows, LORA).reasons if f.key == "kl")
    assert reason.steps == (90, 90) and reason.level == "bad"


def test_a_kl_that_stays_small_is_no_finding(tmp_path: Path) -> None:
    found = written(tmp_path, lambda t: 0.2 * t, range(15, STEPS + 1, 15))
    verdict = judge(found.rows, LORA)
    assert verdict.kind == "green" and all(f.key != "kl" for f in verdict.reasons)


def test_a_directory_without_checks_has_none(tmp_path: Path) -> None:
    assert read_drift(tmp_path / "drift") == {}
