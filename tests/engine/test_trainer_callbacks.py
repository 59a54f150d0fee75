"""transformers' callbacks are called at transformers' moments and obeyed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback, ExportableState
from transformers.trainer_utils import TrainOutput

from fusedgrpo import Callback, GRPOConfig, GRPOTrainer
from fusedgrpo.engine import evaluating
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(4)]
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


def even(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Recorder(TrainerCallback):
    """Keeps (event, step) and what came with it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.given: list[dict[str, Any]] = []

    def events_of(self, *names: str) -> list[tuple[str, int]]:
        return [event for event in self.events if event[0] in names]


def _recording(name: str) -> Any:
    def method(self: Recorder, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.events.append((name.removeprefix("on_"), state.global_step))
        has_gradient = any(p.grad is not None for p in more["model"].parameters())
        self.given.append({"epoch": state.epoch, "gradient": has_gradient, **more})

    return method


for _name in EVENTS:
    setattr(Recorder, _name, _recording(_name))


def trainer(directory: Path, *callbacks: Any, **changes: Any) -> GRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "num_generations": 2,
        "prompts_per_step": 2,
        "max_completion_length": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
    }
    return GRPOTrainer(
        model=tiny.model(),
        reward_funcs=even,
        args=GRPOConfig(**options | changes),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Any:
    seen = Recorder()
    made = trainer(
        tmp_path_factory.mktemp("run"), seen,
        eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    return made, seen, made.train()


def test_the_moments_are_those_of_transformers(run: Any) -> None:
    _, seen, _ = run
    step = ["step_begin", "pre_optimizer_step", "optimizer_step"]
    names = [name for name, _ in seen.events]
    assert names == [
        "init_end", "train_begin",
        "epoch_begin", *step, "step_end", *step, "step_end", "log", "epoch_end",
        "epoch_begin", *step, "step_end", "log", "evaluate", *step, "step_end", "log", "epoch_end",
        "save", "log", "train_end",
    ]  # fmt: skip
    assert seen.events_of("step_end", "evaluate") == [
        ("step_end", 1), ("step_end", 2), ("step_end", 3), ("evaluate", 3), ("step_end", 4),
    ]  # fmt: skip
    epochs = [given["epoch"] for (name, _), given in zip(seen.events, seen.given, strict=True)
              if name == "epoch_end"]  # fmt: skip
    assert epochs == [1.0, 2.0]


def test_they_get_what_they_get_in_transformers(run: Any) -> None:
    made, seen, _ = run
    given = {}
    for (name, _), more in zip(seen.events, seen.given, strict=True):
        assert more["model"] is made.model and more["optimizer"] is made.optimizer
        assert more["processing_class"] is made.processing_class and "train_dataloader" in more
        given[name] = more
    assert given["pre_optimizer_step"]["gradient"] and given["optimizer_step"]["gradient"]
    assert not given["step_end"]["gradient"]
    assert given["log"]["logs"]["train_loss"] == made.state.log_history[-1]["train_loss"]
    assert given["evaluate"]["metrics"]["eval_reward"] == made.state.log_history[1]["eval_reward"]


def test_the_history_has_means_and_evaluations_and_ends_with_the_summary(run: Any) -> None:
    made, _, result = run
    history, rows = made.state.log_history, read_metrics(f"{made.args.output_dir}/metrics.jsonl")
    assert [entry["step"] for entry in history] == [2, 3, 4, 4]
    for name in ("loss", "reward", "completions/mean_length"):
        assert history[0][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2)
    for name in ("grad_norm", "learning_rate", "num_tokens", "epoch"):
        assert history[0][name] == rows[1][name]
    assert not any(name.startswith("eval_") for name in (*history[0], *history[2]))
    assert history[1]["eval_reward"] == rows[2]["eval_reward"]
    assert "eval_runtime" in history[1] and "eval_runtime" not in rows[2]
    assert isinstance(result, TrainOutput)
    step, loss, metrics = result
    assert step == 4 and loss == pytest.approx(sum(row["loss"] for row in rows) / 4)
    assert metrics["reward"] == rows[-1]["reward"] and metrics["train_loss"] == loss
    for name in ("train_runtime", "train_samples_per_second", "train_steps_per_second"):
        assert metrics[name] == history[-1][name] > 0


class Controls(TrainerCallback):
    """Sets flags at the steps it is told."""

    def __init__(self, **flags: int):
        self.flags = flags

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        for flag, step in self.flags.items():
            if state.global_step == step:
                setattr(control, flag, True)
        return control


def test_control_is_obeyed(tmp_path: Path) -> None:
    asks = Controls(should_log=1, should_evaluate=1, should_save=2, should_training_stop=3)
    seen = Recorder()
    made = trainer(tmp_path, asks, seen, logging_steps=100)
    assert made.train().global_step == 3
    assert seen.events_of("log", "evaluate", "save", "epoch_end", "train_end") == [
        ("log", 1), ("log", 1), ("evaluate", 1), ("epoch_end", 2), ("save", 2),
        ("epoch_end", 3), ("log", 3), ("train_end", 3),
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert "eval_reward" in read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (tmp_path / "adapter").is_dir()
    # Without the default flow, nothing is done that nobody asks for.
    silent = trainer(tmp_path / "silent", max_steps=1, eval_strategy="steps", eval_steps=1)
    assert isinstance(silent.pop_callback(DefaultFlowCallback), DefaultFlowCallback)
    silent.train()
    assert [set(entry) & {"loss", "eval_reward"} for entry in silent.state.log_history] == [set()]


def test_an_epoch_that_is_stopped_is_left(tmp_path: Path) -> None:
    seen = Recorder()
    made = trainer(tmp_path, Controls(should_epoch_stop=1), seen, generation_batch_size=8)
    result = made.train()
    assert result.global_step == 3 and made.state.epoch == 2.0
    assert seen.events_of("epoch_begin", "epoch_end") == [
        ("epoch_begin", 0), ("epoch_end", 1), ("epoch_begin", 1), ("epoch_end", 3),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="has finished its run"):
        made.train()


class Counts(TrainerCallback, ExportableState):
    def __init__(self, by: int = 1):
        self.by, self.count = by, 0

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.count += self.by

    def state(self) -> dict[str, Any]:
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


def test_a_resumed_run_goes_on_with_history_and_states(tmp_path: Path) -> None:
    whole, first, second = Counts(), Counts(), Counts(by=10)
    straight = trainer(tmp_path / "whole", whole)
    straight.train()
    stopped = trainer(tmp_path / "cut", first, Controls(should_save=3, should_training_stop=3))
    stopped.train()
    again = trainer(tmp_path / "cut", second)
    again.train(resume_from_checkpoint=True)
    assert (whole.count, first.count, second.count) == (4, 3, 13)
    times = ("runtime", "per_second", "time", "memory/")

    def entries(made: GRPOTrainer) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in entry.items() if not any(word in k for word in times)}
            for entry in made.state.log_history[:-1]
        ]

    assert entries(again) == entries(straight)
    for ours, theirs in zip(again.policy.trainable(), straight.policy.trainable(), strict=True):
        assert torch.equal(ours[1], theirs[1])


class Unspeakable(Counts):
    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"count": torch.ones(1)}}


class Both(TrainerCallback, Callback):  # type: ignore[misc]
    pass


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"callbacks: Unspeakable.state\(\) goes into checkp"):
        trainer(tmp_path, Unspeakable()).train()
    with pytest.raises(ConfigError, match="Make two of it"):
        trainer(tmp_path, Both())


def test_callbacks_come_and_go(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    ours, theirs = Callback(), Recorder()
    made.add_callback(ours)
    made.add_callback(theirs)
    made.add_callback(Counts)
    assert made.callbacks == [ours] and theirs in made.callback_handler.callbacks
    assert made.pop_callback(Recorder) is theirs and made.pop_callback(Recorder) is None
    made.remove_callback(Counts)
    assert [type(one).__name__ for one in made.callback_handler.callbacks] == ["DefaultFlow"]
    made.log({"mine": 1.5})
    assert made.state.log_history == [{"mine": 1.5, "epoch": 0.0, "step": 0}]
    with pytest.raises(ConfigError, match="expected instances"):
        made.add_callback(print)


def test_early_stopping_ends_with_the_best_weights(tmp_path: Path, monkeypatch: Any) -> None:
    scores = iter([0.1, 0.5, 0.4, 0.5, 0.9])  # of evaluations; as good is not better
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    made = trainer(
        tmp_path, stop, eval_strategy="steps", eval_steps=1, max_steps=8,
        save_strategy="best", load_best_model_at_end=True, metric_for_best_model="reward",
    )  # fmt: skip
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, **__: {"reward": next(scores)})
    weights: dict[int, torch.Tensor] = {}
    adapter = next(p for _, p in made.policy.trainable())
    seen = Callback()
    seen.on_step = lambda row: weights.update({row["step"]: adapter.detach().clone()})  # type: ignore[method-assign]
    made.add_callback(seen)
    made.train()
    assert list(weights) == [1, 2, 3, 4]
    assert made.state.best_global_step == 2 and made.state.best_metric == 0.5
    assert made.state.best_model_checkpoint.endswith("step-000002")
    assert torch.equal(adapter, weights[2]) and not torch.equal(adapter, weights[4])
