"""Whole runs whose LoRA layers are one node for each input: up to rounding those of peft's layers,
and to the bit their own when they are resumed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.models.adapters import fused_lora
from fusedgrpo.models.policy import Policy

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(7)]
CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")


def even_ids(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def make(directory: Path, **changes: Any) -> GRPOTrainer:
    options = {
        "output_dir": str(directory),
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 5,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",  # not of how many steps there are
        "lora_r": 4,
        "lora_alpha": 6,
        "beta": 0.1,
        "num_iterations": 2,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
    }
    return GRPOTrainer(
        model=tiny.model("Llama"),
        reward_funcs=even_ids,
        args=GRPOConfig(**options | changes),
        train_dataset=PROMPTS,
        tokenizer=tiny.tokenizer(),
    )


def state(trainer: GRPOTrainer) -> tuple[list[dict[str, Any]], torch.Tensor]:
    rows = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]
    return rows, torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_is_that_of_pefts_layers(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                own = functools.partialmethod(Policy.__init__, fused_lora=False)
                patch.setattr(Policy, "__init__", own)
            run = make(tmp_path / str(fused), gradient_checkpointing=checkpointing)
            assert (run.policy.lora is not None) == fused
            run.train()
            found.append(state(run))
    (rows, weights), (want_rows, want_weights) = found
    for row, want in zip(rows, want_rows, strict=True):
        assert row == pytest.approx(want, rel=5e-4, abs=2e-5)
    torch.testing.assert_close(weights, want_weights, rtol=1e-3, atol=1e-4)
    # Policy, old policy and reference are one computation.
    assert rows[0]["kl"] == 0 and rows[0]["loss"] == pytest.approx(want_rows[0]["loss"], abs=1e-6)


def test_layers_are_asked_once_for_all_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old policy, reference and update: three times in a step of several micro-batches."""
    run = make(tmp_path, tokens_per_microbatch=8, drift_check=False, held_out_check=False)
    run.step()
    asked, passed = [], []
    monkeypatch.setattr(fused_lora, "not_fused", asked.append)
    hidden = Policy.hidden

    def counted(self: Policy, *args: Any, **named: Any) -> torch.Tensor:
        passed.append(self)
        return hidden(self, *args, **named)

    monkeypatch.setattr(Policy, "hidden", counted)
    for updates in (1, 2):  # the second of the first rollout, and the first of the next
        asked.clear(), passed.clear()
        run.step()
        assert len(passed) > 3
        assert len(asked) == (1 if updates == 1 else 3) * len(set(asked))


def test_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    whole.train()
    first = make(tmp_path / "parts", max_steps=2, save_strategy="steps", save_steps=1)
    first.train()
    second = make(tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    rows, weights = state(second)
    want_rows, want_weights = state(whole)
    assert rows == want_rows
    assert torch.equal(weights, want_weights)
