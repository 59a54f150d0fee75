"""Runs of a mixture of experts: its router's loss is in them, whole, however they are cut."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ModelError

PROMPTS = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w5", "w6 w6 w7")]


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def trainer(path, *, model, reward_funcs=even_ids, **changes):
    options = {
        "output_dir": str(path), "num_generations": 4, "prompts_per_step": 2, "max_steps": 2,
        "max_completion_length": 6, "learning_rate": 1e-2, "gradient_checkpointing": False,
        "save_strategy": "no", "finetuning_type": "full", "bf16": False, "use_cpu": True,
    }  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=reward_funcs,
        args=GRPOConfig(**options | changes),
        train_dataset=PROMPTS,
        tokenizer=tiny.tokenizer(),
    )


def rows_of(made):
    return read_metrics(f"{made.args.output_dir}/metrics.jsonl")


def weights(made):
    return torch.cat([p.detach().flatten() for _, p in made.policy.trainable()])


def mixture(coef=0.5):
    return tiny.mixture("Mixtral", router_aux_loss_coef=coef)


def constant(completion_ids, **kwargs):
    return [1.0] * len(completion_ids)


def run(path, **changes):
    made = trainer(path, **{"model": mixture()} | changes)
    made.train()
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens_per_microbatch": 16},
        {"shared_prompt": "off", "tokens_per_microbatch": 25},
        {"gradient_checkpointing": True, "tokens_per_microbatch": 16},
    ],
    ids=["cut", "cut, prompts not shared", "cut, checkpointed"],
)
def test_the_run_does_not_depend_on_the_cut(tmp_path, changes):
    whole, cut = run(tmp_path / "whole"), run(tmp_path / "cut", **changes)
    for a, b in zip(rows_of(whole), rows_of(cut), strict=True):
        assert b["num_forwarded_tokens"] > a["num_forwarded_tokens"]
        for name in ("aux_loss", "loss", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-4, atol=1e-5)


def test_loss_and_metric_are_those_of_trl(tmp_path, monkeypatch):
    """TRL's loss of a batch is the policy's plus coefficient times that of all its tokens, prompts
    once per completion, padding aside."""
    made = trainer(tmp_path, model=mixture(), max_steps=1)
    seen = {}
    step = made.learner.step

    def watched(samples, number):
        model = made.policy.model
        pairs = [(sample.prompt_ids, sample.completion_ids) for sample in samples]
        longest = max(len(p) + len(c) for p, c in pairs)
        ids = torch.tensor([[*p, *c, *[0] * (longest - len(p) - len(c))] for p, c in pairs])
        mask = torch.tensor([[int(i < len(p) + len(c)) for i in range(longest)] for p, c in pairs])
        logits = model.model(
            input_ids=ids, attention_mask=mask, output_router_logits=True
        ).router_logits
        seen["aux_loss"] = load_balancing_loss_func(logits, 4, 2, mask).item()
        made.policy.router, router = None, made.policy.router
        seen["loss"], _ = made.learner._accumulate(samples, number)
        made.learner.optimizer.zero_grad(set_to_none=True)
        made.policy.router = router
        return step(samples, number)

    monkeypatch.setattr(made.learner, "step", watched)
    made.train()
    row = rows_of(made)[0]
    assert made.aux_loss_enabled and made.state.log_history[-1]["aux_loss"] == row["aux_loss"]
    assert row["aux_loss"] == pytest.approx(seen["aux_loss"], rel=1e-5)
    assert row["loss"] == pytest.approx(seen["loss"] + 0.5 * seen["aux_loss"], rel=1e-5)


def test_rows_without_advantage_train_the_router(tmp_path):
    """Equal rewards: the policy has no gradient at all, the router has."""
    before = weights(trainer(tmp_path / "x", model=mixture()))
    balanced = run(tmp_path / "a", reward_funcs=constant)
    row = rows_of(balanced)[0]
    assert row["grad_norm"] > 0 and row["frac_rows_skipped"] == 0
    assert not torch.equal(weights(balanced), before)
    without = run(tmp_path / "b", reward_funcs=constant, router_aux_loss_coef=0)
    row = rows_of(without)[0]
    assert row["grad_norm"] == 0 and row["frac_rows_skipped"] == 1 and "aux_loss" not in row
    torch.testing.assert_close(weights(without), before, rtol=0, atol=0)


def test_the_first_update_on_a_rollout_finds_ratios_of_exactly_one(tmp_path):
    """Old and reference log-probs take the same route, with the same tokens beside them."""
    with_lora = {"finetuning_type": "lora", "beta": 0.1, "num_iterations": 2}
    rows = rows_of(run(tmp_path, tokens_per_microbatch=30, max_steps=2, **with_lora))
    assert rows[0]["kl"] == 0 and rows[0]["clip_ratio/region_mean"] == 0
    assert rows[1]["kl"] > 0


def test_a_coefficient_for_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is no mixture of experts"):
        trainer(tmp_path, model=tiny.model(), router_aux_loss_coef=0.01)
