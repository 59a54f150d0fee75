"""A run goes on with the rollout weights that it began with, whatever the machine would choose."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import process_runs
import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer, host
from fusedgrpo.engine.memory import rollout_weights
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.rollout import decoder_sampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.errors import ModelError
from fusedgrpo.models.adapters.merged_weights import MergedWeights
from fusedgrpo.models.adapters.rollout_weights import AdapterWeights

CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")
KINDS: dict[str, Any] = {"adapter": AdapterWeights, "merged": MergedWeights}
OTHER = {"adapter": "merged", "merged": "adapter"}


def machine(monkeypatch: pytest.MonkeyPatch, chooses: str) -> None:
    """From here on this is a machine with room for a copy of the weights, or without."""
    size = 2**40 if chooses == "merged" else 1
    monkeypatch.setattr(host, "memory", lambda: size)
    monkeypatch.setattr(rollout_weights, "WORTH_IT", 1)  # these completions are short


def make(directory: Path, **changes: Any) -> GRPOTrainer:
    # An adapter that counts: a fresh one is zero, and merging it rounds nothing.
    options = {"model": tiny.model("Llama"), "prompts_per_step": 2, "max_steps": 4}
    options |= {"learning_rate": 3e-2, "save_strategy": "no", "beta": 0.0}
    return process_runs.make(directory, **options | changes)


def kept(trainer: Any) -> str:
    """What its completions come from."""
    (name,) = [name for name, kind in KINDS.items() if type(trainer.sampler.weights) is kind]
    assert trainer.run_sampler.weights == name
    return name


def outcome(trainer: GRPOTrainer) -> tuple[list[dict[str, Any]], torch.Tensor]:
    rows = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]
    return rows, torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])


def interrupted(directory: Path, **changes: Any) -> None:
    trainer = make(directory, **changes)
    step = trainer.learner.step

    def stopping(samples: Any, number: int) -> Any:
        if number == 2:
            raise KeyError("stop")
        return step(samples, number)

    trainer.learner.step = stopping  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="stop"):
        trainer.train()


@pytest.mark.parametrize("began", KINDS)
def test_it_goes_on_as_it_began_on_a_machine_that_chooses_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, began: str
) -> None:
    machine(monkeypatch, began)
    whole = make(tmp_path / "whole")
    assert kept(whole) == began
    whole.train()
    interrupted(tmp_path / "run")

    machine(monkeypatch, OTHER[began])
    run = make(tmp_path / "run")
    assert kept(run) == OTHER[began]
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        run.train(resume_from_checkpoint=True)
    assert kept(run) == began
    assert f"{began}, with which the run began" in caplog.text
    assert f"would have chosen {OTHER[began]}" in caplog.text
    (rows, weights), (other_rows, other_weights) = outcome(whole), outcome(run)
    assert rows == other_rows and torch.equal(weights, other_weights)


def test_where_the_machine_chooses_the_same_nothing_is_said_or_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(monkeypatch, "merged")
    interrupted(tmp_path / "run")
    run = make(tmp_path / "run")
    before = run.sampler
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        run.train(resume_from_checkpoint=True)
    assert run.sampler is before and "with which the run began" not in caplog.text


def test_a_checkpoint_that_does_not_say_and_a_run_that_is_free_take_what_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, "merged")
    interrupted(tmp_path / "free")
    plain = GRPOTrainer.state_dict

    def of_an_older_version(trainer: GRPOTrainer, unsynced: Any = ()) -> dict[str, Any]:
        found = plain(trainer, unsynced)
        del found["state"]["rollout_weights"]
        return found

    with monkeypatch.context() as older:
        older.setattr(GRPOTrainer, "state_dict", of_an_older_version)
        interrupted(tmp_path / "older")
    machine(monkeypatch, "adapter")
    for name, options in (("free", {"allow_change": ["rollout_weights"]}), ("older", {})):
        run = make(tmp_path / name, **options)
        run.train(resume_from_checkpoint=True)
        assert kept(run) == "adapter", name
        assert run.state_dict()["state"]["rollout_weights"] == "adapter"


def test_what_the_option_says_is_taken_and_another_one_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, "adapter")
    state = make(tmp_path / "auto").state_dict()
    asked = make(tmp_path / "asked", rollout_weights="merged")
    asked.load_state_dict(state)  # whether it is the same run is for the caller to know
    assert kept(asked) == "merged"


def test_a_run_without_our_decoder_has_no_such_weights(tmp_path: Path) -> None:
    run = make(tmp_path / "run", sampler="generate")
    assert run.state_dict()["state"]["rollout_weights"] is None
    decoded = make(tmp_path / "decoded").state_dict()
    run.load_state_dict(decoded)
    assert isinstance(run.sampler, GenerateSampler)


def test_a_copy_that_nobody_asked_for_does_not_stand_in_the_way_of_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(policy: Any, how: Any) -> None:
        raise ModelError("sampler: decoder does not give the log-probs of training.")

    monkeypatch.setattr(decoder_sampler, "check_decoder", refused)
    machine(monkeypatch, "merged")
    run = make(tmp_path / "run")
    assert isinstance(run.sampler, GenerateSampler) and run.run_sampler.weights == "adapter"
    with pytest.raises(ModelError, match="does not give"):
        make(tmp_path / "asked", rollout_weights="merged")


# --- with a plan ----------------------------------------------------------------------------------

QUICKLY_PLANNED: dict[str, Any] = {"gradient_checkpointing": False, "tokens_per_microbatch": 128}


@pytest.mark.slow
def test_what_it_goes_on_with_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(tiny.save(tmp_path / "model", tiny.model("Llama")))
    options = {"model": model, "gpu_memory": "8GB"} | QUICKLY_PLANNED
    machine(monkeypatch, "adapter")
    interrupted(tmp_path / "run", **options)
    machine(monkeypatch, "merged")
    run = make(tmp_path / "run", **options)
    assert run.memory_plan is not None and run.memory_plan.rollout_weights == "merged"
    run.execution.oom_retry.in_flight = 1
    run.train(resume_from_checkpoint=True)
    assert kept(run) == run.memory_plan.rollout_weights == "adapter"
    assert run.execution.oom_retry.in_flight == run.memory_plan.max_in_flight > 1


class Passed:
    def sample(self, *_: Any, **__: Any) -> list[Any]:
        return []


@pytest.mark.slow
def test_a_sampler_that_was_passed_is_not_planned_as_ours(tmp_path: Path) -> None:
    model = str(tiny.save(tmp_path / "model", tiny.model("Llama")))
    for sampler, kind in ((None, "K/V pages"), (Passed(), "KV cache")):
        run = GRPOTrainer(
            model=model,
            reward_funcs=process_runs.even_ids,
            args=GRPOConfig(
                output_dir=str(tmp_path / "run"),
                num_generations=4,
                prompts_per_step=2,
                max_completion_length=40,
                bf16=False,
                gpu_memory="8GB",
                **QUICKLY_PLANNED,
            ),
            train_dataset=process_runs.PROMPTS,
            tokenizer=tiny.tokenizer(),
            sampler=sampler,
        )
        plan = run.memory_plan
        assert plan is not None and kind in plan.phases["rollout"]
        copies = {"merged copy for rollouts", "adapter as rollouts have it"}
        assert bool(copies & plan.resident.keys()) == (sampler is None)
        assert plan.rollout_weights == ("merged" if sampler is None else "adapter")
