"""Callbacks are told what happens, and change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import Callback, GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(5)]


def even(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def on_rollout(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        self.events.append(("rollout", step, len(records), sorted(records[0])))

    def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.events.append(("evaluate", step, metrics["eval_reward"]))

    def on_step(self, row: Mapping[str, Any]) -> None:
        self.events.append(("step", row["step"], dict(row)))

    def on_end(self, directory: Path) -> None:
        self.events.append(("end", sorted(p.name for p in directory.iterdir())))


class Vandal(Callback):
    """Changes all that it is given."""

    def on_rollout(self, step: int, records: Any) -> None:
        for record in records:
            record["completion"] = record["advantage"] = None
            record["rewards"].clear()
        records.clear()

    def on_evaluate(self, step: int, metrics: Any) -> None:
        metrics.clear()

    def on_step(self, row: Any) -> None:
        row.clear()


def trainer(directory: Path, *callbacks: Any, **changes: Any) -> GRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "num_generations": 2,
        "prompts_per_step": 1,
        "generation_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "bf16": False,
        "use_cpu": True,
    }
    return GRPOTrainer(
        model=tiny.model(),
        reward_funcs=even,
        args=GRPOConfig(**options | changes),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        tokenizer=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


def test_they_are_told_everything_in_order_and_in_the_words_of_the_log(tmp_path: Path) -> None:
    seen = Recorder()
    trainer(tmp_path, seen).train()
    kinds = [event[:2] for event in seen.events[:-1]]
    assert kinds == [
        ("rollout", 1), ("step", 1), ("evaluate", 2), ("step", 2),
        ("rollout", 3), ("step", 3), ("evaluate", 4), ("step", 4),
    ]  # fmt: skip
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [event[2] for event in seen.events if event[0] == "step"] == rows
    assert seen.events[2][2] == rows[1]["eval_reward"] and "grad_norm" in rows[0]
    assert seen.events[0][2] == 4 and {"completion", "rewards"} <= set(seen.events[0][3])
    kind, files = seen.events[-1]
    assert kind == "end" and {"adapter", "report.html"} <= set(files)


def test_nothing_that_they_do_to_their_arguments_changes_the_run(tmp_path: Path) -> None:
    plain, seen = trainer(tmp_path / "plain"), Recorder()
    watched = trainer(tmp_path / "watched", Vandal(), seen)
    plain.train()
    watched.train()
    weights = [
        torch.cat([p.flatten() for _, p in run.policy.trainable()]) for run in (plain, watched)
    ]
    assert torch.equal(*weights)
    completions = [
        [file.read_text() for file in sorted((tmp_path / name / "completions").iterdir())]
        for name in ("plain", "watched")
    ]
    assert completions[0] == completions[1]
    assert [event[0] for event in seen.events].count("step") == 4 and seen.events[0][2] == 4


def test_an_error_in_one_ends_the_run_after_saving(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_step(self, row: Mapping[str, Any]) -> None:
            if row["step"] == 3:
                raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        trainer(tmp_path, Fails()).train()
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-000003"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("wrong", [Recorder, lambda row: None, "tensorboard"])
def test_what_is_no_callback_is_refused(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks: expected instances of fusedgrpo\.Callback"):
        trainer(tmp_path, wrong)
