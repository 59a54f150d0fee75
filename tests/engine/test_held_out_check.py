"""Held-out prompts are answered before, during and after a run, and nothing else changes."""

from __future__ import annotations

import errno
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.held_out_check import PROMPTS
from fusedgrpo.engine.reporting.completions_log import CompletionsLog
from fusedgrpo.engine.reporting.disk_refusals import ATTEMPTS
from fusedgrpo.engine.reporting.held_out_log import check_rows, read_checks
from fusedgrpo.engine.reporting.metrics_log import read_metrics

TRAINED = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]
HELD_OUT = [{"prompt": p} for p in ("w5 w6 w7", "w8 w9")]


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(path: Path, held_out: Any = None, **options: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(path), use_cpu=True, bf16=False, num_generations=2, prompts_per_step=2,
        max_completion_length=4, learning_rate=0.05, finetuning_type="full",
        **{"max_steps": 6, "save_steps": 3} | options,
    )  # fmt: skip
    return GRPOTrainer(
        tiny.model(), even_ids, args, TRAINED, HELD_OUT if held_out is None else held_out,
        processing_class=tiny.tokenizer(),
    )  # fmt: skip


def rewards(path: Path) -> dict[int, list[float]]:
    checks = read_checks(path / "held_out")
    return {step: [r["reward"] for r in records] for step, records in checks.items()}


def without_clock(path: Path) -> list[dict[str, Any]]:
    timed = ("time", "step_time", "tokens_per_second", "memory")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)}
        for row in read_metrics(path / "metrics.jsonl")
    ]


def test_a_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    make(tmp_path / "with").train()
    make(tmp_path / "without", held_out_check=False).train()
    assert without_clock(tmp_path / "with") == without_clock(tmp_path / "without")
    assert not (tmp_path / "without/held_out").exists()
    found = rewards(tmp_path / "with")
    # A tenth of 24 completions pays for one check of two prompts between the ends.
    assert list(found) == [0, 3, 6]
    assert all(len(of_step) == 2 for of_step in found.values())
    (first, *_, last) = check_rows(read_checks(tmp_path / "with/held_out"))
    assert first["eval_greedy_reward"] == sum(found[0]) / 2
    assert last["eval_greedy_rewards/even_ids/mean"] == sum(found[6]) / 2

    # From a checkpoint the same answers come again, and those that are there stay.
    written = [tmp_path / f"with/held_out/step-00000{step}.jsonl" for step in (0, 3)]
    before = [path.stat().st_mtime_ns for path in written]
    again = make(tmp_path / "with")
    again.train(str(tmp_path / "with/checkpoints/step-000003"))
    assert rewards(tmp_path / "with") == found
    assert [path.stat().st_mtime_ns for path in written] == before


def test_a_run_that_stops_early_is_checked_where_it_stops(tmp_path: Path) -> None:
    run = make(tmp_path, held_out={"a": HELD_OUT, "b": HELD_OUT[:1]}, max_steps=50)
    step = run.step

    def stop_at_2(outputs: Any) -> Any:
        row = step(outputs)
        run.control.should_training_stop = row["step"] == 2
        return row

    run.step = stop_at_2
    run.train()
    found = read_checks(tmp_path / "held_out")
    assert max(found) == 2 and min(found) == 0
    assert [record["set"] for record in found[2]] == ["a", "a", "b"]
    assert "eval_b_greedy_reward" in check_rows(found)[0]


@pytest.mark.parametrize("count", [PROMPTS, 1000])
def test_many_prompts_are_thinned_evenly(tmp_path: Path, count: int) -> None:
    run = make(tmp_path, held_out=[{"prompt": f"w{4 + i % 9} w5"} for i in range(count)])
    (prompts,) = run.held_out_check.sets.values()
    rows = [example.row for example in prompts.examples]
    assert len(rows) == len(set(rows)) == PROMPTS
    gaps = {b - a for a, b in pairwise(rows)}
    assert max(gaps) - min(gaps) <= 1
    # They are many for so short a run: its ends alone.
    assert run.held_out_check.steps() == {0, 6}


def test_as_many_are_sampled_at_once_as_a_rollout_has_room_for(tmp_path: Path) -> None:
    """Keys and values of a rollout: each prompt's once, each completion's."""
    run = make(tmp_path)  # 2 x 2 completions of 4 tokens, prompts of at most 4: 24 tokens
    (prompts,) = run.held_out_check.sets.values()
    assert max(len(example.prompt_ids) for example in prompts.examples) == 3
    assert run.held_out_check._at_once(prompts) == 24 // (3 + 4)
    run.execution.oom_retry.in_flight = 2  # it was halved: one prompt, two completions
    assert run.held_out_check._at_once(prompts) == 12 // (3 + 4)


def test_answers_that_a_full_disk_did_not_take_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, refused = CompletionsLog.write, []

    def full_once(log: CompletionsLog, step: int, records: Any) -> Path:
        if log.directory.name == "held_out" and step == 3 and len(refused) < ATTEMPTS:
            refused.append(step)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(log, step, records)

    monkeypatch.setattr(CompletionsLog, "write", full_once)
    with caplog.at_level(logging.WARNING):
        make(tmp_path).train()
    assert refused and "answers to held-out prompts of step 3 could not be written" in caplog.text
    assert list(rewards(tmp_path)) == [0, 3, 6]
