"""A reference that follows the policy, and an entropy bonus that follows the entropy: in a run,
and in one that was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.checkpointing import REFERENCE
from fusedgrpo.engine.entropy_bonus import EntropyBonus
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError

PROMPTS = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12")]
TIMES = ("time/", "step_time", "tokens_per_second", "memory/")


def even_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def make(path: Path, **changes: Any) -> GRPOTrainer:
    options = {
        "output_dir": str(path), "num_generations": 4, "prompts_per_step": 1, "max_steps": 5,
        "max_completion_length": 5, "learning_rate": 1e-2, "bf16": False, "use_cpu": True,
        "gradient_checkpointing": False, "save_strategy": "no", "lora_r": 2, "beta": 0.2,
        "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25,
        "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 3.3,
        "top_entropy_quantile": 0.6, "off_policy_mask_threshold": 0.01, "num_iterations": 2,
    } | changes  # fmt: skip
    return GRPOTrainer(
        tiny.model(), even_ids, GRPOConfig(**options), PROMPTS, processing_class=tiny.tokenizer()
    )


def weights(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.trainable()}


def rows(path: Path) -> list[dict[str, Any]]:
    found = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in found]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_reference_that_follows_resumes_bit_for_bit(tmp_path: Path, kind: str) -> None:
    changes = {"finetuning_type": kind} | ({"learning_rate": 1e-3} if kind == "full" else {})
    whole = make(tmp_path / "a", **changes)
    expected = {k: v.clone() for k, v in (whole.policy.reference_weights() or {}).items()}
    step, seen = whole.step, []

    def follow(outputs: Any = None) -> Any:
        row = step(outputs)
        if whole.progress.step % 2 == 0:
            for name, p in weights(whole).items():
                expected[name] = 0.75 * expected[name] + 0.25 * p
        now = whole.policy.reference_weights()
        assert now is not None
        seen.append(all(torch.allclose(now[k], v, atol=1e-7) for k, v in expected.items()))
        return row

    whole.step = follow
    whole.train()
    assert seen == [True] * 5
    part = make(tmp_path / "b", **changes, save_strategy="steps", save_steps=3)
    part.learner.step = stopping(part.learner.step)
    with pytest.raises(RuntimeError, match="stop"):
        part.train()
    assert (tmp_path / "b/checkpoints/step-000003" / REFERENCE).exists()
    again = make(tmp_path / "b", **changes)
    again.train(True)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    mine, theirs = again.policy.reference_weights(), whole.policy.reference_weights()
    assert mine is not None and theirs is not None
    assert all(torch.equal(mine[name], p) for name, p in theirs.items())
    assert all(torch.equal(weights(again)[name], p) for name, p in weights(whole).items())
    assert again.learner.bonus == whole.learner.bonus and whole.learner.bonus.coef != 0.01
    assert {row["entropy_coef"] for row in rows(tmp_path / "a")} != {0.01}
    # The adapter of the run is the policy's and not the reference's.
    assert not (tmp_path / "a" / ("adapter" if kind == "lora" else "model") / REFERENCE).exists()


def stopping(step: Any) -> Any:
    def stop(samples: Any, number: int) -> Any:
        if number == 3:
            raise RuntimeError("stop")
        return step(samples, number)

    return stop


def test_a_reference_that_follows_all_of_the_policy_is_the_policy(tmp_path: Path) -> None:
    """From then on the KL of a rollout's first update is exactly 0."""
    made = make(tmp_path, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0, num_iterations=1,
                use_adaptive_entropy=False, entropy_coef=0.0, top_entropy_quantile=1.0)  # fmt: skip
    made.train()
    assert [row["kl"] for row in rows(tmp_path)] == [0.0] * 5


def test_the_cut_into_micro_batches_does_not_change_which_tokens_count(tmp_path: Path) -> None:
    whole = make(tmp_path / "a", sync_ref_model=False, adam_epsilon=1e-3)
    cut = make(tmp_path / "b", sync_ref_model=False, adam_epsilon=1e-3, tokens_per_microbatch=12)
    for run in (whole, cut):
        run.train()
    for name, p in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], p, rtol=0, atol=1e-6)
    assert [r["entropy_coef"] for r in rows(tmp_path / "a")] == [
        r["entropy_coef"] for r in rows(tmp_path / "b")
    ]


def test_the_controller_stays_between_its_bounds() -> None:
    bonus = EntropyBonus(0.02, True, low=0.01, high=0.03, delta=0.015, target=1.0)
    seen = []
    for entropy in (0.5, 0.5, 2.0, 2.0, 0.5):
        bonus.update(entropy)
        seen.append((round(bonus.coef, 6), round(bonus.weight, 6)))
    assert seen == [(0.03, 0.03), (0.03, 0.03), (0.015, 0.0), (0.01, 0.0), (0.025, 0.025)]
    fixed = EntropyBonus(0.02)
    fixed.update(0.0)
    assert (fixed.weight, fixed.state()) == (0.02, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sync_ref_model": True}, "sync_ref_model: without beta"),
        ({"top_entropy_quantile": 0.5, "loss_type": "vespo"}, "top_entropy_quantile: loss_type: v"),
        ({"off_policy_mask_threshold": 1.0, "loss_type": "vespo"}, "off_policy_mask_threshold: lo"),
        ({"entropy_coef_min": 0.5, "entropy_coef_max": 0.1}, "entropy_coef_min: 0.5 is above"),
        ({"top_entropy_quantile": 0}, "top_entropy_quantile: expected a number > 0 and <= 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GRPOConfig(**options)
