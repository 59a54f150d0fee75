"""Whole runs on a real GPU: they train, give the same bits again, and go on from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics

pytestmark = pytest.mark.gpu

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(7)]
MEASURED = ("time/", "step_time", "tokens_per_second", "memory/", "roofline/")
KINDS: dict[str, dict[str, Any]] = {
    "lora-bf16": {},
    "lora-fp32": {"bf16": False},
    "lora-fp16": {"bf16": False, "fp16": True},
    "qlora": {"load_in_4bit": True},
    "qlora-merged": {"load_in_4bit": True, "rollout_weights": "merged"},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
    "offload": {"activation_offloading": True, "gradient_checkpointing": True},
    "generate": {"sampler": "generate"},
    "rows": {"shared_prompt": "off"},
    "several-updates": {"num_iterations": 2, "steps_per_generation": 2},
    "eight-bit-adam": {"optim": "adamw_8bit"},
    "held-out": {"eval_strategy": "steps", "eval_steps": 2},
}


def even_ids(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tiny.model("Llama", scale=3.0, hidden_size=128, head_dim=64, intermediate_size=192)
    return tiny.save(tmp_path_factory.mktemp("base"), built)


def make(directory: Path, base: Path, **changes: Any) -> GRPOTrainer:
    values = {
        "output_dir": str(directory),
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 40,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora_r": 8,
        "beta": 0.1,
        "gradient_checkpointing": False,
        "save_steps": 2,
    } | changes
    return GRPOTrainer(
        model=str(base),
        reward_funcs=even_ids,
        args=GRPOConfig(**values),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2] if "eval_strategy" in changes else None,
        processing_class=tiny.tokenizer(),
    )


def rows_of(directory: Path) -> list[dict[str, Any]]:
    rows = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_trains_and_its_seed_gives_the_same_bits_again(
    kind: str, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = []
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        for name in ("once", "again"):
            run = make(tmp_path / name, base, **KINDS[kind])
            before = [p.detach().clone() for _, p in run.policy.trainable()]
            run.train()
            after = [p.detach().clone() for _, p in run.policy.trainable()]
            assert run.policy.device.type == "cuda"
            assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert all(a.isfinite().all() for a in after)
            found.append((rows_of(tmp_path / name), after))
    said = [record.getMessage() for record in caplog.records]
    assert not [text for text in said if "without CUDA graphs" in text]
    (rows, weights), (rows_again, weights_again) = found
    assert rows == rows_again
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_again, strict=True))


@pytest.mark.parametrize("kind", ["lora-bf16", "qlora"])
def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(kind: str, base: Path, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", base, **KINDS[kind])
    whole.train()
    again = make(tmp_path / "again", base, **KINDS[kind])
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoints/step-000002"))
    for (name, a), (_, b) in zip(whole.policy.trainable(), again.policy.trainable(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("sampler", ["merged", "adapter"])
def test_what_sampling_says_of_its_tokens_is_what_training_says(
    sampler: str, base: Path, tmp_path: Path
) -> None:
    run = make(tmp_path, base, rollout_weights=sampler, bf16=False)
    run.train()
    gaps = [row["sampling/sampling_logp_difference/max"] for row in rows_of(tmp_path)]
    assert max(gaps) <= 1e-4


@pytest.mark.parametrize("fused_rollouts", [False, True])
def test_trl_trains_on_our_loss(fused_rollouts: bool, base: Path, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from fusedgrpo.integrations.trl import FusedGRPOTrainer

    torch.manual_seed(0)
    run = FusedGRPOTrainer(
        model=str(base),
        reward_funcs=even_ids,
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4,
            max_completion_length=20, max_steps=2, learning_rate=1e-2, report_to="none",
            logging_steps=1, bf16=True, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        fused_rollouts=fused_rollouts,
    )  # fmt: skip
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))
