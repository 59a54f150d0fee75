"""Whole runs of models whose layers remember something else than keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hybrids
import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics

# Prompts of several lengths, one of them a single token.
PROMPTS = [{"prompt": text} for text in ("w4", "w5 w6 w7 w8 w9", "w8 w9", "w7 w7", "w20 w21 w22")]
SLOW = ("Mamba", "Granite-4-H", "Qwen3-Next", "Nemotron-H", "Zamba2", "xLSTM")
FAMILIES = ["LFM2", "RecurrentGemma"]
FAMILIES += [pytest.param(family, marks=pytest.mark.slow) for family in SLOW]  # type: ignore[misc]
TIMES = ("time/", "step_time", "tokens_per_second", "memory/")


def even_ids(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(directory: Path, family: str, **changes: Any) -> GRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "num_generations": 2,
        "prompts_per_step": 2,
        "generation_batch_size": 8,
        "num_iterations": 2,
        "max_completion_length": 5,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "beta": 0.1,
        "bf16": False,
        "use_cpu": True,
        "router_aux_loss_coef": 0,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return GRPOTrainer(
        model=hybrids.model(family),
        reward_funcs=even_ids,
        args=GRPOConfig(**options | changes),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:3],
        tokenizer=tiny.tokenizer(),
    )


def state(trainer: GRPOTrainer) -> Any:
    rows = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
    return rows, torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_a_run_learns_from_what_was_sampled_and_resumes_bit_for_bit(
    tmp_path: Path, family: str
) -> None:
    whole = make(tmp_path / "whole", family)
    before = state_of_weights(whole)
    whole.warm_up()
    whole.train()
    rows, weights = state(whole)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[-1]["kl"] > 0
    assert rows[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert not torch.equal(weights, before)

    make(tmp_path / "cut", family).train()
    resumed = make(tmp_path / "again", family)
    resumed.train(str(sorted((tmp_path / "cut" / "checkpoints").iterdir())[1]))
    assert torch.equal(state(resumed)[1], weights)
    assert state(resumed)[0] == rows[2:]


def state_of_weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for _, p in trainer.policy.trainable()])


def test_a_step_without_any_gradient_still_compares_sampler_and_policy(tmp_path: Path) -> None:
    run = GRPOTrainer(
        model=tiny.model(),
        reward_funcs=lambda completions, **kwargs: [1.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=2,
            prompts_per_step=1,
            max_steps=1,
            max_completion_length=4,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
        ),
        train_dataset=PROMPTS,
        tokenizer=tiny.tokenizer(),
    )
    run.train()
    (row,) = read_metrics(f"{tmp_path}/metrics.jsonl")
    assert row["frac_rows_skipped"] == 1
    assert 0 <= row["sampling/sampling_logp_difference/max"] < 1e-4
