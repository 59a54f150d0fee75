"""A loss of the user's own: as exact as ours, and refused with a reason where it is none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.custom_loss import CustomLoss, LossTokens, find_custom_loss
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError
from fusedgrpo.kernels import LossOptions, policy_loss

FILE = '''
import torch

def clipped(tokens):
    """The loss of dapo, as its paper writes it."""
    ratio = (tokens.logp - tokens.old_logp).exp()
    e = tokens.options.epsilon
    a = tokens.advantages
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - e, 1 + e) * a)
    return loss, {"ratio": ratio}

def sequence(tokens):
    return -tokens.mean(tokens.log_ratio).exp() * tokens.advantages

def toward_flat(tokens):
    """Has a gradient where the advantage is 0."""
    return -tokens.logp * (tokens.advantages + 1)
'''

PROMPTS = [
    {"prompt": " ".join(f"w{4 + (i * j) % 30}" for j in range(1, 3 + i % 4))} for i in range(7)
]


def ragged() -> dict[str, Any]:
    torch.manual_seed(3)
    old = -torch.rand(12) * 2
    return {
        "logp": (old + 0.4 * torch.randn(12)).requires_grad_(),
        "advantages": torch.tensor([1.0, -0.5, 0.7]),
        "cu_seqlens": torch.tensor([0, 5, 5, 12]),
        "old_logp": old,
        "ref_logp": old + 0.1 * torch.randn(12),
        "mask": torch.tensor([True] * 9 + [False] * 3),
        "sampler_ratio": torch.tensor([1.5, float("inf"), *[0.8] * 10]),
        "entropy": torch.rand(12),
        "num_items": 31,
    }


def code(tmp_path: Path) -> Path:
    (tmp_path / "losses.py").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_formula_of_dapo_is_dapo(tmp_path: Path, bias_correction: bool) -> None:
    options = LossOptions(beta=0.04, use_bias_correction_kl=bias_correction)
    custom = find_custom_loss("losses.py:clipped", [code(tmp_path)])
    assert custom is not None
    inputs = ragged()
    ours = policy_loss(**inputs, **options.to_dict())
    theirs = custom(**inputs, options=options)
    torch.testing.assert_close(theirs.loss, ours.loss, rtol=1e-6, atol=1e-7)
    gradients = [torch.autograd.grad(x.loss, inputs["logp"])[0] for x in (ours, theirs)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert not gradients[1][9:].any() and not gradients[1][1], "masked, and without a weight"
    for name in ("kl", "entropy", "sampling/dropped_tokens"):
        torch.testing.assert_close(
            theirs.metrics[name], ours.metrics[name], rtol=1e-5, atol=1e-7, check_dtype=False
        )
    assert theirs.metrics["ratio"].isfinite()


def test_nothing_of_a_masked_token_gets_into_the_gradient(tmp_path: Path) -> None:
    custom = find_custom_loss("losses.py:sequence", [code(tmp_path)])
    assert custom is not None
    logp = torch.tensor([-1.0, -2.0, -torch.inf, torch.nan], requires_grad=True)
    mask = torch.tensor([True, True, False, False])
    loss, _ = custom(
        logp,
        torch.tensor([1.0]),
        torch.tensor([0, 4]),
        options=LossOptions(),
        num_items=2,
        mask=mask,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    assert gradient.isfinite().all() and not gradient[2:].any() and gradient[:2].all()


def trained(tmp_path: Path, name: str, **changes: Any) -> GRPOTrainer:
    options = {
        "output_dir": str(tmp_path / name),
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 6,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "num_iterations": 2,
        "sampler_correction": True,
        "beta": 0.04,
        "bf16": False,
        "use_cpu": True,
    }
    run = GRPOTrainer(
        model=tiny.model(),
        reward_funcs=lambda completion_ids, **_: [
            sum(i % 2 == 0 for i in ids) for ids in completion_ids
        ],
        args=GRPOConfig(**options | changes),
        train_dataset=PROMPTS,
        tokenizer=tiny.tokenizer(),
        search_paths=[tmp_path],
    )
    run.train()
    return run


def weights(run: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in run.policy.trainable()])


def test_a_run_with_it_is_the_run_with_dapo(tmp_path: Path) -> None:
    code(tmp_path)
    ours = trained(tmp_path, "ours")
    custom = trained(tmp_path, "custom", loss_type="losses.py:clipped")
    torch.testing.assert_close(weights(custom), weights(ours), rtol=0, atol=1e-5)
    cut = trained(tmp_path, "cut", loss_type="losses.py:clipped", tokens_per_microbatch=16)
    torch.testing.assert_close(weights(cut), weights(custom), rtol=0, atol=1e-5)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ours", "custom", "cut")]
    for a, b, c in zip(*rows, strict=True):
        assert b["ratio"] == pytest.approx(c["ratio"], abs=1e-5)
        for key in ("loss", "grad_norm", "kl", "entropy"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
            assert b[key] == pytest.approx(c[key], abs=1e-5), key


def test_no_completion_is_left_out_of_a_loss_that_nothing_is_known_of(tmp_path: Path) -> None:
    code(tmp_path)
    options: dict[str, Any] = {"beta": 0.0, "loss_type": "losses.py:toward_flat"}
    run = GRPOTrainer(
        model=tiny.model(),
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            num_generations=2,
            prompts_per_step=2,
            num_iterations=2,
            max_completion_length=4,
            max_steps=2,
            bf16=False,
            **options,
        ),
        train_dataset=PROMPTS,
        tokenizer=tiny.tokenizer(),
        search_paths=[tmp_path],
    )
    before = weights(run).clone()
    run.train()
    for row in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert row["frac_rows_skipped"] == 0 and row["grad_norm"] > 0
    assert not torch.equal(weights(run), before)


def raising(tokens: LossTokens) -> torch.Tensor:
    raise KeyError("advantage")


WRONG = {
    r"raised KeyError: 'advantage'": raising,
    r"returned 0\.5 as the loss": lambda tokens: 0.5,
    r"returned \(\) as the loss": lambda tokens: tokens.logp.sum(),
    r"does not depend on logp": lambda tokens: tokens.logp.detach() * 2,
    r"metrics that are 3": lambda tokens: (tokens.logp, 3),
    r"\(2,\) as x": lambda tokens: (tokens.logp, {"x": torch.zeros(2)}),
    r"'kl', which is one": lambda tokens: (tokens.logp, {"kl": tokens.logp}),
    r"gradient \[nan": lambda tokens: tokens.logp * 0 / 0,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_loss_is_refused_before_any_work(message: str) -> None:
    with pytest.raises(ConfigError, match=rf"loss_type 'mine' .*{message}"):
        CustomLoss("mine", WRONG[message])


def test_names_that_are_none(tmp_path: Path) -> None:
    code(tmp_path)
    for name, message in {
        "losses.py:cliped": "has no 'cliped'.*Did you mean 'clipped'",
        "lost.py:clipped": "no such file",
        "no_module_of_this_name:x": "No module named",
    }.items():
        with pytest.raises(ConfigError, match=f"loss_type '{name}'.*{message}"):
            find_custom_loss(name, [tmp_path])
    with pytest.raises(ConfigError, match=r"loss_type: 'dappo' is none of .*Did you mean 'dapo'"):
        GRPOConfig(loss_type="dappo")


def test_memory_that_runs_out_in_it_is_nobody_else_s_error() -> None:
    def greedy(tokens: LossTokens) -> torch.Tensor:
        raise torch.OutOfMemoryError("too much")

    custom = CustomLoss("mine", lambda tokens: tokens.logp)
    custom.function = greedy
    with pytest.raises(torch.OutOfMemoryError):
        custom(**copy.copy(ragged()), options=LossOptions())
