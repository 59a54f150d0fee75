"""The table of losses is complete, and each surrogate has the derivatives that it says."""

from __future__ import annotations

import importlib

import pytest
import torch

from fusedgrpo.kernels.loss.denominator import loss_denominator
from fusedgrpo.kernels.loss.surrogates import SURROGATES
from fusedgrpo.kernels.loss.types import METRICS, PerToken, name_metrics
from fusedgrpo.loss_options import CLIPPED_LOSS_TYPES, LOSS_TYPES, LOSSES, LossOptions

ALWAYS = {"kl", "entropy", "log_ratio_clamped", "sampling/dropped_tokens"}


def options_of(loss_type: str, **more) -> LossOptions:
    return LossOptions(loss_type=loss_type, max_completion_length=9, **more)


def test_every_loss_has_a_surrogate_and_every_surrogate_a_loss():
    assert {kind.surrogate for kind in LOSSES.values()} == set(SURROGATES)
    for kind in LOSSES.values():
        weighs = SURROGATES[kind.surrogate].completion_weight is not None
        assert weighs == kind.weighs_completions


def test_every_surrogate_is_in_triton_too():
    pytest.importorskip("triton", reason="needs Triton's decorator")
    from fusedgrpo.kernels.loss.surrogates import registry_triton

    assert list(registry_triton.SURROGATES) == list(SURROGATES)
    for name, surrogate in registry_triton.SURROGATES.items():
        ours = SURROGATES[name].completion_weight
        assert (surrogate.completion_weight is None) == (ours is None)


@pytest.mark.parametrize("name", SURROGATES)
def test_every_surrogate_names_its_formula_and_its_paper(name):
    text = importlib.import_module(f"fusedgrpo.kernels.loss.surrogates.{name}").__doc__
    assert "arXiv" in text and "L = " in text and "dL/d" in text


def test_names_and_their_order():
    """The operators carry a loss type as its place in the table."""
    clipped = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
    assert (*clipped, "cispo", "sapo", "vespo") == LOSS_TYPES
    assert clipped == CLIPPED_LOSS_TYPES


@pytest.mark.parametrize(
    "loss_type,own",
    [(name, {m for m in METRICS if m.startswith("clip_ratio/")}) for name in CLIPPED_LOSS_TYPES]
    + [("cispo", {"cispo_clip_ratio"}), ("sapo", set()), ("vespo", {"vespo/phi_seq_mean"})],
)
def test_the_metrics_of_a_loss(loss_type, own):
    values = torch.arange(float(len(METRICS)))
    named = name_metrics(values, options_of(loss_type, beta=0.1), entropy=True, sampler_ratio=True)
    assert set(named) == own | ALWAYS
    for name, value in named.items():
        entry = "clip_ratio/high_mean" if name == "cispo_clip_ratio" else name
        assert METRICS[int(value)] == entry


@pytest.mark.parametrize(
    "loss_type,divisor",
    [("grpo", 2), ("bnpo", 5), ("dr_grpo", 2 * 9), ("dapo", 5), ("luspo", 2), ("cispo", 5),
     ("sapo", 2), ("vespo", 5)],
)  # fmt: skip
def test_what_a_loss_is_divided_by(loss_type, divisor):
    got = loss_denominator(options_of(loss_type), torch.zeros(5), 2, PerToken(), None, None)
    assert got.item() == divisor
    assert options_of(loss_type).mean_per_completion == (loss_type in ("grpo", "sapo"))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("delta", [None, 1.1])
def test_the_derivatives_are_those_of_autograd(loss_type, delta):
    options = options_of(loss_type, delta=delta, epsilon=0.1, epsilon_high=0.3)
    surrogate = SURROGATES[options.kind.surrogate].token_terms
    g = torch.Generator().manual_seed(0)
    ratio = (0.5 * torch.randn(64, generator=g, dtype=torch.float64)).exp()
    advantage, logp = torch.randn(2, 64, generator=g, dtype=torch.float64)
    weight = torch.rand(64, generator=g, dtype=torch.float64)
    leaves = ratio.requires_grad_(), logp.requires_grad_()
    terms = surrogate(ratio, advantage, logp, weight, options)
    by_ratio, by_logp = torch.autograd.grad(terms.value.sum(), leaves, allow_unused=True)
    if by_logp is None:  # the ratio carries the gradient
        torch.testing.assert_close(terms.by_ratio, by_ratio)
        assert not terms.by_logp.any()
    else:  # a weight that is stopped
        torch.testing.assert_close(terms.by_logp, by_logp)
        assert not terms.by_ratio.any()
