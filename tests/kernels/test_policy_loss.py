"""policy_loss against the sequence-by-sequence reference in float64, and its exact properties."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import LOSS_TYPES, LossOptions, policy_loss
from fusedgrpo.kernels.reference import reference_policy_loss


def make(lengths=(5, 0, 3, 1, 7), seed=0, spread=0.3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    N, B = sum(lengths), len(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    logp = -torch.rand(N, generator=g, dtype=dtype) * 3
    old = logp + spread * torch.randn(N, generator=g, dtype=dtype)
    ref = logp + spread * torch.randn(N, generator=g, dtype=dtype)
    advantages = torch.randn(B, generator=g, dtype=dtype)
    mask = torch.rand(N, generator=g) < 0.8
    ratio = (0.5 * torch.randn(N, generator=g, dtype=dtype)).exp()
    return logp.requires_grad_(), advantages, cu, old, ref, mask, ratio


def options_of(kwargs):
    return LossOptions(
        **{k: v for k, v in kwargs.items() if k not in ("num_items", "num_sequences")}
    )


@settings(max_examples=200, deadline=None)
@given(
    loss_type=st.sampled_from(LOSS_TYPES), level=st.sampled_from(["token", "sequence"]),
    beta=st.sampled_from([0.0, 0.1]), corrected=st.booleans(),
    delta=st.sampled_from([None, 1.5]), epsilon_high=st.sampled_from([None, 0.4]),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), seed=st.integers(0, 99),
    masked=st.booleans(), weighted=st.booleans(), on_policy=st.booleans(),
)  # fmt: skip
def test_loss_and_gradient_equal_the_reference(
    loss_type,
    level,
    beta,
    corrected,
    delta,
    epsilon_high,
    lengths,
    seed,
    masked,
    weighted,
    on_policy,
):
    logp, advantages, cu, old, ref, mask, ratio = make(lengths, seed)
    kwargs = {
        "loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "delta": delta,
        "use_bias_correction_kl": corrected, "epsilon_high": epsilon_high,
        "max_completion_length": 9,
    }  # fmt: skip
    tensors = {
        "old_logp": None if on_policy else old, "ref_logp": ref,
        "mask": mask if masked else None, "sampler_ratio": ratio if weighted else None,
    }  # fmt: skip
    got = policy_loss(logp, advantages, cu, **tensors, **kwargs).loss
    want = reference_policy_loss(logp, advantages, cu, options=options_of(kwargs), **tensors)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    ours, theirs = torch.autograd.grad(got, logp)[0], torch.autograd.grad(want, logp)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradcheck_where_nothing_is_detached(loss_type, level):
    logp, advantages, cu, old, ref, _, _ = make(spread=0.05)
    if loss_type in ("cispo", "vespo"):
        old = None  # the detached weight is then constant 1 and finite differences see no drift
    kwargs = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "max_completion_length": 9,
    }

    def frozen_weight(x):
        if loss_type in ("cispo", "vespo"):
            # With old_logp = x.detach() the weight cannot move; differences of the rest remain.
            return policy_loss(x, advantages, cu, old_logp=x.detach(), **kwargs).loss
        return policy_loss(x, advantages, cu, old_logp=old, ref_logp=ref, beta=0.1, **kwargs).loss

    assert torch.autograd.gradcheck(frozen_weight, (logp,), nondet_tol=0.0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_any_split_into_micro_batches_adds_up(loss_type, level):
    logp, advantages, cu, old, ref, mask, _ = make()
    kwargs = {
        "loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1,
        "max_completion_length": 9, "num_items": int(mask.sum()), "num_sequences": len(advantages),
    }  # fmt: skip
    whole = policy_loss(logp, advantages, cu, old_logp=old, ref_logp=ref, mask=mask, **kwargs).loss
    parts = 0
    for first, last in ((0, 1), (1, 4), (4, 5)):
        rows = slice(int(cu[first]), int(cu[last]))
        parts += policy_loss(
            logp[rows], advantages[first:last], cu[first : last + 1] - cu[first],
            old_logp=old[rows], ref_logp=ref[rows], mask=mask[rows], **kwargs,
        ).loss  # fmt: skip
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_everything_masked_is_exactly_zero_and_connected(loss_type):
    logp, advantages, cu, old, ref, mask, ratio = make()
    out = policy_loss(
        logp, advantages, cu, old_logp=old * torch.inf, ref_logp=ref * torch.inf, beta=0.1,
        mask=torch.zeros_like(mask), sampler_ratio=ratio, loss_type=loss_type, entropy=ref,
        max_completion_length=9,
    )  # fmt: skip
    assert out.loss.item() == 0
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(value.isfinite() for value in out.metrics.values())


def test_on_policy_ratio_is_one_and_the_loss_is_minus_the_mean_advantage():
    logp, advantages, cu, *_ = make(lengths=(2, 2, 2))
    out = policy_loss(logp, advantages, cu)
    torch.testing.assert_close(out.loss, -advantages.mean())
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "log_ratio_clamped"):
        assert out.metrics[name].item() == 0


def test_identical_reference_gives_a_kl_of_exactly_zero():
    logp, advantages, cu, *_ = make()
    out = policy_loss(logp, advantages, cu, ref_logp=logp.detach().clone(), beta=0.5)
    assert out.metrics["kl"].item() == 0


@pytest.mark.parametrize("gap", [100.0, 1e4, torch.inf])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_overflowing_log_ratios_stay_finite_both_ways(gap, sign, loss_type):
    """exp of a log-ratio of 100 is inf in float32, and 0 * inf is NaN in its backward."""
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    old = logp.detach() + sign * torch.tensor([0.0, gap, gap])
    for mask in (torch.tensor([True, False, False]), torch.tensor([True, True, True])):
        if gap == torch.inf and mask.all():
            continue
        out = policy_loss(
            logp, torch.tensor([1.0, -1.0]), torch.tensor([0, 2, 3]), old_logp=old, ref_logp=old,
            beta=0.1, mask=mask, loss_type=loss_type, max_completion_length=9,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, logp)
        assert out.loss.isfinite() and grad.isfinite().all()
        want = 2 / 3 if mask.all() else 0
        assert out.metrics["log_ratio_clamped"].item() == pytest.approx(want)


def test_a_token_without_a_finite_sampler_weight_leaves_both_sides_of_the_mean():
    logp, advantages, cu, old, _, _, ratio = make(lengths=(3, 3))
    bad = ratio.clone()
    bad[[1, 4]] = torch.tensor([torch.nan, torch.inf], dtype=bad.dtype)
    got = policy_loss(logp, advantages, cu, old_logp=old, sampler_ratio=bad)
    keep = bad.isfinite()
    want = policy_loss(logp, advantages, cu, old_logp=old, sampler_ratio=ratio, mask=keep)
    assert torch.equal(got.loss, want.loss)
    assert got.metrics["sampling/dropped_tokens"].item() == 2
    assert want.metrics["sampling/dropped_tokens"].item() == 0


def test_clip_sides():
    """Only a ratio above with A > 0, or below with A < 0, is clipped and loses its gradient."""
    old = torch.zeros(4)
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    out = policy_loss(
        logp, advantages, torch.arange(5), old_logp=old, epsilon=0.1, epsilon_high=0.3
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert (grad != 0).tolist() == [False, True, True, False]
    assert out.metrics["clip_ratio/high_mean"] == out.metrics["clip_ratio/low_mean"] == 0.25
    assert out.metrics["clip_ratio/region_mean"] == 0.5
    assert out.metrics["clip_ratio/high_max"] == 1 and out.metrics["clip_ratio/low_min"] == 0
    torch.testing.assert_close(
        out.loss.detach(), (-1.3 + torch.tensor(0.5).exp() - torch.tensor(-0.5).exp() + 0.9) / 4
    )


def test_sequence_level_metrics_count_completions_not_tokens():
    logp, advantages, cu = torch.ones(4), torch.tensor([1.0, -1.0]), torch.tensor([0, 3, 4])
    out = policy_loss(
        logp, advantages, cu, old_logp=torch.zeros(4), importance_sampling_level="sequence"
    )
    assert out.metrics["clip_ratio/high_mean"] == 0.5


def test_entropy_is_averaged_over_unmasked_tokens():
    logp, advantages, cu, *_ = make(lengths=(2, 2))
    entropy = torch.tensor([1.0, 2, 3, 100])
    mask = torch.tensor([True, True, True, False])
    out = policy_loss(logp, advantages, cu, entropy=entropy, mask=mask)
    assert out.metrics["entropy"].item() == 2


@pytest.mark.parametrize(
    "change,message",
    [
        ({"loss_type": "ppo"}, "loss_type='ppo'"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level='group'"),
        ({"epsilon": -0.2}, "epsilon=-0.2"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"beta": 0.1}, "needs ref_logp"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"old_logp": torch.zeros(3)}, "old_logp has shape"),
        ({"advantages": torch.zeros(3)}, "cu_seqlens has shape"),
    ],
)
def test_bad_arguments_are_named(change, message):
    logp, advantages, cu, *_ = make()
    with pytest.raises(ValueError, match=message):
        policy_loss(**{"logp": logp, "advantages": advantages, "cu_seqlens": cu, **change})
