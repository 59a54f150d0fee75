"""What the evaluations of a run sample is kept like its rollouts, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import tiny

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting import completions_folding
from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.reporting.unwritten import Unwritten

TRAINED = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]
SETS = {"a": [{"prompt": "w5 w6 w7"}, {"prompt": "w8 w9"}], "b": [{"prompt": "w10"}]}


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(path: Path, held_out: Any, **options: Any) -> GRPOTrainer:
    usual = {
        "max_steps": 4, "save_steps": 2, "eval_on_start": True, "eval_strategy": "steps",
        "eval_steps": 2, "held_out_check": False,
    }  # fmt: skip
    args = GRPOConfig(
        output_dir=str(path), use_cpu=True, bf16=False, num_generations=2, prompts_per_step=2,
        max_completion_length=4, learning_rate=0.05, finetuning_type="full", **usual | options,
    )  # fmt: skip
    return GRPOTrainer(
        tiny.model(), even_ids, args, TRAINED, held_out, processing_class=tiny.tokenizer()
    )


def evaluations(path: Path) -> dict[int, list[dict[str, Any]]]:
    found = Completions(path / "eval_completions")
    return {step: found.read(step) for step in found.steps}


def test_every_evaluation_is_kept_once_and_dropped_with_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path, SETS)
    run.train()
    found = evaluations(tmp_path)
    assert list(found) == [0, 2, 4]
    assert not run.unwritten.evaluations
    rows = {row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl")}
    for step, records in found.items():
        assert [(r["set"], r["group"]) for r in records] == [
            ("a", 0), ("a", 0), ("a", 1), ("a", 1), ("b", 0), ("b", 0)
        ]  # fmt: skip
        assert all("advantage" not in record and record["step"] == step for record in records)
        for name in SETS:
            rewards = [record["reward"] for record in records if record["set"] == name]
            assert fmean(rewards) == pytest.approx(rows[step][f"eval_{name}_reward"])

    # What a user evaluates is his own.
    run.evaluate()
    assert evaluations(tmp_path) == found and not run.unwritten.evaluations

    # Folded or not, later evaluations make room when a run goes on from before, and come again.
    monkeypatch.setattr(completions_folding, "FOLDED", 3)
    folded = completions_folding.FoldingLog(tmp_path / "eval_completions")
    assert folded.fold_if_due() is None
    assert not list(folded.directory.glob("*.jsonl"))
    make(tmp_path, SETS).train(str(tmp_path / "checkpoints/step-000002"))
    assert evaluations(tmp_path) == found
    assert list(Completions(folded.directory / "dropped-001").steps) == [4]
    # Rollouts were folded in the run itself.
    assert list((tmp_path / "completions").glob("steps-000001-000003.parquet"))
    assert Completions(tmp_path / "completions").steps == [1, 2, 3, 4]


def test_a_checkpoint_has_the_evaluation_that_is_not_written_yet() -> None:
    waiting = Unwritten(evaluations={4: [{"set": "a", "reward": 1.0}]})
    assert waiting
    state = json.loads(json.dumps(waiting.state([])))
    assert Unwritten.from_state(state) == waiting
    del state["evaluations"]  # a checkpoint of a version before
    assert not Unwritten.from_state(state)


def test_a_run_that_does_not_evaluate_has_none(tmp_path: Path) -> None:
    make(tmp_path, None, eval_strategy="no", eval_on_start=False, max_steps=1).train()
    assert not (tmp_path / "eval_completions").exists()


def test_one_set_has_no_name(tmp_path: Path) -> None:
    make(tmp_path, SETS["a"], max_steps=1, eval_on_start=False, eval_steps=1).train()
    assert {record["set"] for record in evaluations(tmp_path)[1]} == {""}
