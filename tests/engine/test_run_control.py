"""When a run logs, evaluates and saves: as transformers' trainer does, and the best is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import DefaultFlowCallback

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine import checkpoint_files
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.reporting.run_dir import RunDir
from fusedgrpo.engine.run_control import RunControl
from fusedgrpo.errors import CheckpointError, ConfigError

PROMPTS = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]


def control(prompts: int = 10, **options: Any) -> RunControl:
    args = GRPOConfig(**{"prompts_per_step": 1} | options)
    return RunControl(args, resolve_batch(args, prompts))


def steps_of(asked: Any, total: int) -> list[int]:
    return [step for step in range(1, total + 1) if asked(step)]


@pytest.mark.parametrize(("every", "total"), [(3, 9), (0.1, 25), (0.34, 7), (1, 2), (100, 5)])
@pytest.mark.parametrize("first", [False, True])
def test_steps_and_shares_of_the_run_are_those_of_transformers(
    every: float, total: int, first: bool
) -> None:
    ours = control(
        max_steps=total, logging_steps=every, save_steps=every, eval_steps=every,
        eval_strategy="steps", logging_first_step=first,
    )  # fmt: skip
    args: Any = ours.args
    state = TrainerState(max_steps=total)
    state.compute_steps(args, total)
    for step in range(1, total):  # at the end transformers evaluates and saves whatever is due
        state.global_step = step
        theirs = DefaultFlowCallback().on_step_end(args, state, TrainerControl())
        asked = (ours.logs(step), ours.evaluates(step), ours.saves(step))
        assert asked == (theirs.should_log, theirs.should_evaluate, theirs.should_save), step


def test_an_epoch_ends_where_the_data_does_and_the_last_with_the_run() -> None:
    by_epoch = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    plain = control(4, max_steps=10, **by_epoch)
    for asked in (plain.saves, plain.evaluates, plain.logs):
        assert steps_of(asked, 10) == [4, 8, 10]
    odd = control(5, num_train_epochs=3, prompts_per_step=2, **by_epoch)
    assert steps_of(odd.saves, odd.total_steps) == [3, 5, 8]
    # Two passes over rollouts of three steps.
    passes = control(6, num_train_epochs=2, steps_per_generation=3, num_iterations=2,
                     num_generations=8, **by_epoch)  # fmt: skip
    assert passes.total_steps == 24 and steps_of(passes.saves, 24) == [12, 24]
    none = control(4, max_steps=10, logging_strategy="no", save_strategy="no")
    assert not any(none.logs(s) or none.saves(s) or none.shows(s, True) for s in range(1, 11))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end: the best of no evaluation"),
        ({"save_strategy": "best"}, "save_strategy: the best of no evaluation"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "no"},
            "load_best_model_at_end: the weights come from a checkpoint",
        ),
        ({"save_steps": 1.5}, "save_steps: expected a share of the run < 1 or a whole number"),
        ({"logging_steps": 0}, "logging_steps: expected"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GRPOConfig(**options)


def test_the_best_is_what_the_metric_says() -> None:
    ours = control(max_steps=5, metric_for_best_model="kl_loss")
    for step, value in enumerate([0.5, float("nan"), 0.2, 0.2, None], 1):
        ours.observe(step, {"eval_kl_loss": value, "eval_reward": 1.0})
    assert (ours.best_global_step, ours.best_metric) == (3, 0.2)
    ours.args.greater_is_better = True
    ours.observe(6, {"eval_kl_loss": 0.9})
    assert ours.best_global_step == 6
    again = control(max_steps=5)
    again.restore(json.loads(json.dumps(ours.to_record())))
    assert again.best == ours.best
    with pytest.raises(ConfigError, match=r"gives no eval_kl_loss; there are eval_reward"):
        ours.observe(7, {"eval_reward": 1.0})


def even_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def make(path: Path, rewards: dict[int, float], **changes: Any) -> GRPOTrainer:
    """A trainer whose evaluation after each step gives what ``rewards`` says."""
    options = {
        "output_dir": str(path), "num_generations": 2, "prompts_per_step": 1, "max_steps": 5,
        "max_completion_length": 4, "learning_rate": 1e-2, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "save_strategy": "best", "lora_r": 2,
    } | changes  # fmt: skip
    made = GRPOTrainer(
        tiny.model(), even_ids, GRPOConfig(**options), PROMPTS, PROMPTS[:1],
        processing_class=tiny.tokenizer(),
    )  # fmt: skip
    made.evaluate = lambda: {"eval_reward": rewards[made.progress.step]}
    return made


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for _, p in trainer.policy.trainable()])


def kept(path: Path) -> list[str]:
    return [p.name for p in checkpoint_files.checkpoints(path / "checkpoints")]


def test_a_run_ends_with_the_weights_of_its_best_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rewards = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.3, 4: 0.4, 5: 0.2}
    run = make(tmp_path / "a", rewards, save_strategy="steps", save_steps=1, save_total_limit=1,
               eval_on_start=True, logging_strategy="no")  # fmt: skip
    after: dict[int, torch.Tensor] = {}
    step = run.step
    run.step = lambda outputs: [step(outputs), after.update({run.progress.step: weights(run)})][0]
    run.train()
    assert kept(tmp_path / "a") == ["step-000002", "step-000005"]
    assert torch.equal(weights(run), after[2]) and not torch.equal(after[2], after[5])
    assert run.run_control.best_model_checkpoint == tmp_path / "a" / "checkpoints" / "step-000002"
    shown = capsys.readouterr().out
    assert "Best by eval_reward: 0.5, after step 2: the weights are those of" in shown
    assert "eval_reward 0.9" in shown and "step 1" not in shown
    assert [row["eval_reward"] for row in read_metrics(tmp_path / "a/metrics.jsonl")] == [
        rewards[k] for k in range(6)
    ]
    saved = checkpoint_files.read_tensors(tmp_path / "a/adapter/adapter_model.safetensors")
    best = checkpoint_files.read_tensors(
        tmp_path / "a/checkpoints/step-000002/adapter/adapter_model.safetensors"
    )
    assert all(torch.equal(saved[name], best[name]) for name in best)
    # Interrupted after its best step, it still knows it, and the row of step 0 stays.
    again = make(tmp_path / "a", rewards, max_steps=5, resume_from_checkpoint="step")
    again.train(str(tmp_path / "a/checkpoints/step-000002"))
    assert again.run_control.best_global_step == 2 and torch.equal(weights(again), after[2])
    assert [r["step"] for r in read_metrics(tmp_path / "a/metrics.jsonl")] == list(range(6))


def test_checkpoints_of_the_weights_alone(tmp_path: Path) -> None:
    rewards = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.6, 5: 0.2}
    run = make(tmp_path, rewards, save_only_model=True)
    run.train()
    assert kept(tmp_path) == ["step-000001", "step-000002", "step-000004"]
    files = {p.name for p in (tmp_path / "checkpoints/step-000004").iterdir()}
    assert files == {"adapter", "state.json", "manifest.json"}
    state = checkpoint_files.read_json(tmp_path / "checkpoints/step-000004/state.json")
    assert state["best"] == {"step": 4, "metric": 0.6}
    with pytest.raises(CheckpointError, match="save_only_model: weights to use, not to go on from"):
        make(tmp_path, rewards).train(str(tmp_path / "checkpoints/step-000004"))
    # What an error saves is whole: the run goes on from it.
    broken = make(tmp_path / "b", rewards, save_only_model=True)
    broken.evaluate = lambda: {"eval_loss": 1.0}
    with pytest.raises(ConfigError, match="evaluation gives no eval_reward"):
        broken.train()
    going_on = make(tmp_path / "b", rewards, save_only_model=True)
    going_on.train(True)
    assert going_on.progress.step == 5 and going_on.run_control.best_global_step == 4


def test_a_best_that_was_deleted_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make(tmp_path, {1: 0.5, 2: 0.1}, max_steps=2)
    observe = run.run_control.observe

    def delete(step: int, metrics: Any) -> None:
        observe(step, metrics)
        if step == 2:
            checkpoint_files.remove(tmp_path / "checkpoints/step-000001")

    run.run_control.observe = delete
    with caplog.at_level(logging.WARNING):
        run.train()
    assert "Its checkpoint is gone: the weights are the last ones" in caplog.text
    assert (RunDir(tmp_path).path / "adapter").is_dir()


@pytest.mark.peer
def test_a_run_of_trls_arguments(tmp_path: Path) -> None:
    """And a learning rate that an evaluation moves, known to the run that goes on."""
    trl = pytest.importorskip("trl")

    def of_trl(**changes: Any) -> GRPOTrainer:
        options = {
            "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "max_steps": 4,
            "num_generations": 2, "per_device_train_batch_size": 2, "report_to": "none",
            "max_completion_length": 4, "per_device_eval_batch_size": 2, "optim": "sgd",
            "eval_strategy": "steps", "eval_steps": 0.25, "save_steps": 0.5,
            "optim_args": "momentum=0.9", "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}, "learning_rate": 1e-3,
            "metric_for_best_model": "reward", "generation_kwargs": {"stop": "w9"},
        } | changes  # fmt: skip
        made = GRPOTrainer(
            tiny.model(), even_ids, trl.GRPOConfig(**options), PROMPTS, PROMPTS[:1],
            processing_class=tiny.tokenizer(),
        )  # fmt: skip
        made.evaluate = lambda: {"eval_reward": 0.5}
        return made

    whole = of_trl()
    whole.train()
    assert whole.policy.adapters is None and whole.sampling.stop_strings == ("w9",)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rates == [1e-3, 1e-3, 5e-4, 2.5e-4]
    after = weights(whole)
    again = of_trl()
    again.train(str(tmp_path / "checkpoints/step-000002"))
    assert [row["learning_rate"] for row in read_metrics(tmp_path / "metrics.jsonl")] == rates
    assert torch.equal(weights(again), after) and again.state.best_global_step == 1
