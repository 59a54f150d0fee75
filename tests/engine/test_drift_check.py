"""A few completions are scored before and after an update, and nothing else changes."""

from __future__ import annotations

import dataclasses
import errno
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.drift_check import COMPLETIONS, DriftCheck, telling
from fusedgrpo.engine.reporting.completions_log import CompletionsLog
from fusedgrpo.engine.reporting.drift_log import drift_rows, read_drift
from fusedgrpo.engine.reporting.metrics_log import read_jsonl, read_metrics
from fusedgrpo.engine.reporting.recorded_run import RecordedRun
from fusedgrpo.engine.rollout.training_sample import TrainingSample

TRAINED = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]
# Two steps of each rollout, twice: steps 1, 5, ... sample.
WINDOW = {"generation_batch_size": 8, "num_iterations": 2}
CLOCK = ("time", "step_time", "tokens_per_second", "memory")


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(path: Path, **options: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(path), use_cpu=True, bf16=False, num_generations=2, prompts_per_step=2,
        max_completion_length=4, learning_rate=0.05, lora_r=2, gradient_checkpointing=False,
        **{"max_steps": 6, "save_strategy": "no"} | options,
    )  # fmt: skip
    return GRPOTrainer(tiny.model(), even_ids, args, TRAINED, processing_class=tiny.tokenizer())


def stopping_after(trainer: GRPOTrainer, last: int) -> GRPOTrainer:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == last

    trainer.add_callback(Stops())
    return trainer


def files(path: Path) -> dict[str, str]:
    return {f"{p.parent.name}/{p.name}": p.read_text() for p in sorted(path.glob("*/*.jsonl"))}


def rows(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(CLOCK)}
        for row in read_metrics(path / "metrics.jsonl")
    ]


def test_a_run_is_the_same_with_and_without_and_after_a_resume(tmp_path: Path) -> None:
    checked = make(tmp_path / "with", save_strategy="steps", save_steps=2, **WINDOW)
    checked.train()
    plain = make(tmp_path / "without", drift_check=False, **WINDOW)
    plain.train()
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    for (name, ours), (_, theirs) in zip(
        checked.policy.trainable(), plain.policy.trainable(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    whole = files(tmp_path / "with")
    drift = {name for name in whole if name.startswith("drift/")}
    assert drift == {"drift/step-000001.jsonl", "drift/step-000006.jsonl"}
    assert files(tmp_path / "without") == {n: t for n, t in whole.items() if n not in drift}

    # Go on in the middle of the second pass over a rollout: what came later is made again.
    make(tmp_path / "with", **WINDOW).train(str(tmp_path / "with/checkpoints/step-000002"))
    again = files(tmp_path / "with")
    assert {name: again[name] for name in whole} == whole
    (dropped,) = (tmp_path / "with/drift").glob("dropped-*")
    assert [path.name for path in dropped.iterdir()] == ["step-000006.jsonl"]


def test_log_probs_are_those_of_the_policy_and_of_what_it_began_as(tmp_path: Path) -> None:
    run = make(tmp_path, **WINDOW)
    run.train()
    drift = read_drift(tmp_path / "drift")
    assert list(drift) == [1, 6]
    for record in drift[1]:
        assert record["before"] == record["reference"] != record["after"]

    logged = read_jsonl(tmp_path / "completions/step-000005.jsonl")
    completions = list(run.buffer.rollout.completions())  # type: ignore[union-attr]
    for record in drift[6]:
        told = logged[record["completion"]]
        assert record["rollout"] == 5
        for name in ("group", "row", "reward", "advantage", "prompt", "finish_reason"):
            assert record[name] == told[name]
        assert record["advantage"] != 0
        ids = completions[record["completion"]].ids
        assert "".join(record["tokens"]) == run.tokenizer.decode(ids)
        packed = run.policy.pack([(run.tokenizer(record["prompt"]).input_ids, ids)])
        with run.policy.scoring():
            now = run.policy.logprobs(packed).logp
            with run.policy.reference():
                began = run.policy.logprobs(packed).logp
        assert record["after"] == pytest.approx(now.tolist(), abs=1e-4)
        assert record["reference"] == pytest.approx(began.tolist(), abs=1e-4)
        assert record["before"] != record["after"]

    recorded = RecordedRun.read(tmp_path)
    assert recorded.kl_is_sampled
    assert [(r["step"], r["kl"]) for r in recorded.rows if "kl" in r] == [
        (r["step"], r["kl"]) for r in drift_rows(drift)
    ]
    assert drift_rows(drift)[-1]["kl"] > 0


def test_a_run_that_stops_early_is_checked_where_it_stops(tmp_path: Path) -> None:
    stopping_after(make(tmp_path, max_steps=50, **WINDOW), 3).train()
    drift = read_drift(tmp_path / "drift")
    assert max(drift) == 3
    assert {record["rollout"] for record in drift[3]} == {1}
    # Nobody knew before the update that it would be the last one.
    assert all(record["before"] is None for record in drift[3])
    assert drift_rows(drift)[-1]["step"] == 3


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_all_weights_have_a_reference_where_one_is_kept(tmp_path: Path, beta: float) -> None:
    make(tmp_path, finetuning_type="full", beta=beta, max_steps=2).train()
    drift = read_drift(tmp_path / "drift")
    assert list(drift) == [1, 2]
    assert all((r["reference"] is not None) == bool(beta) for r in drift[2])
    recorded = RecordedRun.read(tmp_path)
    assert not recorded.kl_is_sampled
    assert all(("kl" in row) == bool(beta) for row in recorded.rows)


def test_an_update_that_was_not_applied_is_not_checked(tmp_path: Path) -> None:
    run = make(tmp_path, max_nonfinite_steps=1, max_steps=2)
    step = run.learner.step

    def first_is_skipped(samples: Any, number: int) -> Any:
        return dataclasses.replace(step(samples, number), applied=number > 0)

    run.learner.step = first_is_skipped  # type: ignore[method-assign]
    run.train()
    assert list(read_drift(tmp_path / "drift")) == [2]


def test_a_policy_that_was_ruined_ends_no_run_in_a_check(tmp_path: Path) -> None:
    run = make(tmp_path, max_steps=1)
    applied = run.learner.step

    def ruin(samples: Any, number: int) -> Any:
        result = applied(samples, number)
        with torch.no_grad():
            run.policy.trainable()[0][1].fill_(torch.inf)
        return result

    run.learner.step = ruin  # type: ignore[method-assign]
    scored = run.drift_check.records

    def then_mended(begun: Any) -> Any:
        found = scored(begun)
        with torch.no_grad():
            run.policy.trainable()[0][1].fill_(0.0)
        return found

    run.drift_check.records = then_mended  # type: ignore[method-assign]
    run.train()
    assert None in read_drift(tmp_path / "drift")[1][0]["after"]


def test_what_a_full_disk_did_not_take_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, refused = CompletionsLog.write, []

    def full_at_first(log: CompletionsLog, step: int, records: Any) -> Path:
        if log.directory.name == "drift" and len(refused) < 3:
            refused.append(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(log, step, records)

    monkeypatch.setattr(CompletionsLog, "write", full_at_first)
    make(tmp_path, max_steps=2).train()
    assert "log-probs before and after of step 1 could not be written" in caplog.text
    assert list(read_drift(tmp_path / "drift")) == [1, 2]


@pytest.mark.parametrize(
    ("total", "each", "count"), [(1, 16, 1), (2, 16, 2), (20, 16, 2), (100, 16, 6), (5000, 16, 10)]
)
def test_checks_are_spread_evenly_and_few_in_a_short_run(total: int, each: int, count: int) -> None:
    plan = SimpleNamespace(total_steps=total, completions_per_step=each)
    check = DriftCheck(
        SimpleNamespace(
            plan=plan,
            args=SimpleNamespace(drift_check=True),
            policy=SimpleNamespace(has_reference=False),
        )
    )
    steps = sorted(check.steps())
    assert len(steps) == count and steps[0] == 1 and steps[-1] == total
    gaps = [b - a for a, b in pairwise(steps)] or [0]
    assert max(gaps) - min(gaps) <= 1
    assert (len(steps) - 2) * COMPLETIONS <= 0.02 * total * each


def samples_of(*advantages: float, length: int = 3) -> list[TrainingSample]:
    return [TrainingSample((1, 2), tuple(range(length)), a) for a in advantages]


def test_the_most_telling_completions_are_chosen() -> None:
    two_each = [0, 0, 1, 1, 2, 2]
    # The greatest and the least, then from the group that has none yet.
    chosen = samples_of(0.5, -0.5, 1.0, -0.9, 0.2, -2.0)
    assert telling(chosen, two_each, 15) == [0, 2, 5]
    assert telling(chosen, two_each, 1000) == [0, 1, 2, 3, 4, 5]
    assert telling(samples_of(0.0, 0.0, 1.0, -1.0, 0.0, 0.0), two_each, 1000) == [2, 3]
    assert telling(samples_of(0.0, 0.0), [0, 0], 1000) == [0, 1]
    assert len(telling(samples_of(*range(-10, 10)), [0] * 20, 1000)) == COMPLETIONS
    # One that alone is longer than a micro-batch is forwarded by itself.
    assert telling(samples_of(1.0, -1.0, length=9), [0, 0], 5) in ([0], [1])
    assert telling([], [], 5) == []
