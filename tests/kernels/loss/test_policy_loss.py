"""policy_loss against the sequence-by-sequence reference in float64, and its exact properties."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import LOSS_TYPES, LossOptions, policy_loss
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.launch import ragged_launch
from fusedgrpo.kernels.loss.op import loss_terms
from fusedgrpo.kernels.loss.types import PerToken
from fusedgrpo.kernels.reference import reference_policy_loss

LEVELS = ("token", "sequence")
TORCH_CPU = ("torch", torch.device("cpu"))


def make(kernel, lengths=(5, 0, 3, 1, 7), seed=0, spread=0.3):
    """logp, advantages, cu_seqlens, old, ref, mask, sampler ratio; float64 where it can be."""
    backend, device = kernel
    dtype = torch.float64 if backend == "torch" else torch.float32
    g = torch.Generator().manual_seed(seed)
    N, B = sum(lengths), len(lengths)
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    logp = -torch.rand(N, generator=g, dtype=dtype) * 3
    old = logp + spread * torch.randn(N, generator=g, dtype=dtype)
    ref = logp + spread * torch.randn(N, generator=g, dtype=dtype)
    advantages = torch.randn(B, generator=g, dtype=dtype)
    mask = torch.rand(N, generator=g) < 0.8
    ratio = (0.5 * torch.randn(N, generator=g, dtype=dtype)).exp()
    out = [x.to(device) for x in (logp, advantages, cu, old, ref, mask, ratio)]
    return [out[0].requires_grad_(), *out[1:]]


def check_against_reference(kernel, inputs, kwargs, tensors):
    """Loss and gradient, relative to the largest entry: 1e-10, or 1e-5 of a float32 kernel."""
    logp, advantages, cu = inputs
    bar = 1e-10 if kernel.backend == "torch" else 1e-5
    got = policy_loss(logp, advantages, cu, backend=kernel.backend, **tensors, **kwargs).loss
    (ours,) = torch.autograd.grad(got, logp)
    exact = logp.detach().double().requires_grad_()
    tensors = {
        k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()
    }
    want = reference_policy_loss(
        exact, advantages.double(), cu, options=LossOptions(**kwargs), **tensors
    )
    (theirs,) = torch.autograd.grad(want, exact)
    terms = theirs.abs().sum() + want.abs()
    assert (got - want).abs() <= bar * terms.clamp(min=1e-3)
    if len(theirs):
        assert (ours - theirs).abs().max() <= bar * theirs.abs().max().clamp(min=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_loss_and_gradient_equal_the_reference(kernel, loss_type, level):
    lengths = (3, 0, 4) if interpreted() else (5, 0, 3, 1, 7)
    logp, advantages, cu, old, ref, mask, ratio = make(kernel, lengths, seed=3)
    cases = itertools.product(
        ((0.0, True), (0.1, False), (0.1, True)), (None, 1.1), (False, True), (False, True)
    )
    if interpreted():  # all of them across the loss types, not for each
        cases = itertools.islice(cases, LOSS_TYPES.index(loss_type) % 3, None, 5)
    for (beta, corrected), delta, masked, weighted in cases:
        kwargs = {
            "loss_type": loss_type, "importance_sampling_level": level, "beta": beta,
            "delta": delta, "use_bias_correction_kl": corrected, "epsilon": 0.1,
            "max_completion_length": 9,
        }  # fmt: skip
        tensors = {
            "old_logp": old, "ref_logp": ref, "mask": mask if masked else None,
            "sampler_ratio": ratio if weighted else None,
        }  # fmt: skip
        check_against_reference(kernel, (logp, advantages, cu), kwargs, tensors)


@settings(
    max_examples=15 if interpreted() else 150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    loss_type=st.sampled_from(LOSS_TYPES), level=st.sampled_from(LEVELS),
    beta=st.sampled_from([0.0, 0.1]), delta=st.sampled_from([None, 1.5]),
    epsilon_high=st.sampled_from([None, 0.4]),
    lengths=st.lists(st.integers(0, 6), min_size=0, max_size=5), seed=st.integers(0, 99),
    masked=st.booleans(), weighted=st.booleans(), on_policy=st.booleans(),
)  # fmt: skip
def test_any_ragged_shape_equals_the_reference(
    kernel, loss_type, level, beta, delta, epsilon_high, lengths, seed, masked, weighted, on_policy
):
    logp, advantages, cu, old, ref, mask, ratio = make(kernel, lengths, seed)
    kwargs = {
        "loss_type": loss_type, "importance_sampling_level": level, "beta": beta, "delta": delta,
        "epsilon_high": epsilon_high, "max_completion_length": 9,
    }  # fmt: skip
    tensors = {
        "old_logp": None if on_policy else old, "ref_logp": ref,
        "mask": mask if masked else None, "sampler_ratio": ratio if weighted else None,
    }  # fmt: skip
    if lengths:
        check_against_reference(kernel, (logp, advantages, cu), kwargs, tensors)
    else:
        out = policy_loss(logp, advantages, cu, backend=kernel.backend, **tensors, **kwargs)
        assert out.loss.item() == 0 and torch.autograd.grad(out.loss, logp)[0].shape == (0,)
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "vespo"])
@pytest.mark.parametrize("level", LEVELS)
def test_completions_longer_than_a_block(kernel, loss_type, level):
    """And than 65,536 tokens, where an index of 16 bits would end; too slow to interpret."""
    long = ragged_launch().block + 5 if interpreted() else 70_001
    logp, advantages, cu, old, ref, mask, _ = make(kernel, (long, 2), spread=0.02)
    kwargs = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1}
    tensors = {"old_logp": old, "ref_logp": ref, "mask": mask}
    check_against_reference(kernel, (logp, advantages, cu), kwargs, tensors)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck_where_nothing_is_detached(loss_type, level):
    logp, advantages, cu, old, ref, _, _ = make(TORCH_CPU, spread=0.05)
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
@pytest.mark.parametrize("level", LEVELS)
def test_any_split_into_micro_batches_adds_up(kernel, loss_type, level):
    logp, advantages, cu, old, ref, mask, _ = make(kernel)
    kwargs = {
        "loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1,
        "max_completion_length": 9, "num_items": int(mask.sum()), "num_sequences": len(advantages),
        "backend": kernel.backend,
    }  # fmt: skip
    whole = policy_loss(logp, advantages, cu, old_logp=old, ref_logp=ref, mask=mask, **kwargs).loss
    parts = 0
    for first, last in ((0, 1), (1, 4), (4, 5)):
        rows = slice(int(cu[first]), int(cu[last]))
        parts += policy_loss(
            logp[rows], advantages[first:last], cu[first : last + 1] - cu[first],
            old_logp=old[rows], ref_logp=ref[rows], mask=mask[rows], **kwargs,
        ).loss  # fmt: skip
    rtol = 1e-12 if logp.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(parts, whole, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t != "vespo"])
def test_fragments_of_a_completion_give_the_coefficients_of_the_whole_bit_by_bit(kernel, loss_type):
    logp, advantages, cu, old, ref, mask, ratio = make(kernel, (5, 0, 3, 6))
    options = LossOptions(loss_type=loss_type, beta=0.1, max_completion_length=9)
    logp, per_token = logp.detach(), PerToken(old, ref, mask, ratio)
    denominator = torch.tensor(7.0, device=kernel.device)
    whole = loss_terms(
        logp, advantages, cu, denominator, options, per_token, backend=kernel.backend
    )
    counts = torch.stack([mask[a:b].sum() for a, b in itertools.pairwise(cu.tolist())])
    parts = [
        loss_terms(
            logp[start:end], advantages, cu.clamp(start, end) - start, denominator, options,
            per_token.at(slice(start, end)), counts=counts, backend=kernel.backend,
        )
        for start, end in ((0, 2), (2, 7), (7, 9), (9, 14))
    ]  # fmt: skip
    assert torch.equal(torch.cat([part.coefficient for part in parts]), whole.coefficient)
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_everything_masked_is_exactly_zero_and_connected(kernel, loss_type):
    logp, advantages, cu, old, ref, mask, ratio = make(kernel)
    out = policy_loss(
        logp, advantages, cu, old_logp=old * torch.inf, ref_logp=ref * torch.inf, beta=0.1,
        mask=torch.zeros_like(mask), sampler_ratio=ratio, loss_type=loss_type, entropy=ref,
        max_completion_length=9, backend=kernel.backend,
    )  # fmt: skip
    assert out.loss.item() == 0
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", LEVELS)
def test_what_stands_at_masked_tokens_is_never_read(kernel, loss_type, level):
    logp, advantages, cu, old, ref, mask, ratio = make(kernel)
    mask[::4] = False
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf], device=kernel.device).to(old)
    garbage = garbage.repeat(len(old))[: len(old)]
    tensors = {"logp": logp.detach(), "old_logp": old, "ref_logp": ref, "sampler_ratio": ratio,
               "entropy": ref}  # fmt: skip

    def run(tensors):
        logp = tensors["logp"].requires_grad_()
        out = policy_loss(
            **tensors, advantages=advantages, cu_seqlens=cu, mask=mask, beta=0.1,
            loss_type=loss_type, importance_sampling_level=level, backend=kernel.backend,
        )  # fmt: skip
        return out, torch.autograd.grad(out.loss, logp)[0]

    clean, clean_grad = run(tensors)
    dirty, grad = run({k: torch.where(mask, x, garbage) for k, x in tensors.items()})
    assert torch.equal(clean.loss, dirty.loss) and torch.equal(clean_grad, grad)
    assert (grad[~mask] == 0).all()
    for name, value in clean.metrics.items():
        assert torch.equal(value, dirty.metrics[name]), name


def test_a_nan_in_an_unmasked_token_shows_in_loss_and_gradient(kernel):
    logp, advantages, cu, old, *_ = make(kernel, (2, 2))
    old[1] = torch.nan
    loss = policy_loss(logp, advantages, cu, old_logp=old, backend=kernel.backend).loss
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.isnan() and grad.isnan().tolist() == [False, True, False, False]


def test_on_policy_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(kernel):
    logp, advantages, cu, *_ = make(kernel, lengths=(2, 2, 2))
    out = policy_loss(logp, advantages, cu, backend=kernel.backend)
    torch.testing.assert_close(out.loss, -advantages.mean())
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean", "log_ratio_clamped"):
        assert out.metrics[name].item() == 0


def test_identical_reference_gives_a_kl_of_exactly_zero(kernel):
    logp, advantages, cu, *_ = make(kernel)
    out = policy_loss(
        logp, advantages, cu, ref_logp=logp.detach().clone(), beta=0.5, backend=kernel.backend
    )
    assert out.metrics["kl"].item() == 0


def test_a_small_kl_keeps_its_digits(kernel):
    """exp(d) - d - 1 of d = 1e-3 in float32 is wrong by a tenth."""
    logp = torch.zeros(1, device=kernel.device)
    ref = torch.full_like(logp, 1e-3)
    cu = torch.tensor([0, 1], device=kernel.device)
    kl = policy_loss(logp, logp, cu, ref_logp=ref, beta=1.0, backend=kernel.backend).metrics["kl"]
    assert kl.item() == pytest.approx(5.0017e-7, rel=1e-3)


@pytest.mark.parametrize("gap", [100.0, torch.inf])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_overflowing_log_ratios_stay_finite_both_ways(kernel, gap, sign, loss_type):
    """exp of a log-ratio of 100 is inf in float32, and 0 * inf is NaN in its backward."""
    logp = torch.tensor([-1.0, -2.0, -3.0], device=kernel.device, requires_grad=True)
    old = logp.detach() + sign * torch.tensor([0.0, gap, gap], device=kernel.device)
    for mask in (torch.tensor([True, False, False]), torch.tensor([True, True, True])):
        out = policy_loss(
            logp, torch.tensor([1.0, -1.0], device=kernel.device), torch.tensor([0, 2, 3]),
            old_logp=old, ref_logp=old, beta=0.1, mask=mask.to(kernel.device), loss_type=loss_type,
            max_completion_length=9, backend=kernel.backend,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, logp)
        assert out.loss.isfinite() and grad.isfinite().all()
        want = 2 / 3 if mask.all() else 0
        assert out.metrics["log_ratio_clamped"].item() == pytest.approx(want)


def test_the_gradient_ends_just_outside_the_clamp(kernel):
    """Of the ratio and of the KL: at a log-ratio of +-20 it still flows, beyond it is 0."""
    gaps = torch.tensor([20.0, 20.5, -20.0, -20.5], device=kernel.device)
    old = torch.zeros(4, device=kernel.device)
    logp = gaps.clone().requires_grad_()
    advantages = -gaps.sign()  # on the side where the clip does not hold
    cu = torch.arange(5, device=kernel.device)
    loss = policy_loss(logp, advantages, cu, old_logp=old, backend=kernel.backend).loss
    (grad,) = torch.autograd.grad(loss, logp)
    want = gaps.exp() * gaps.sign() / 4 * torch.tensor([1.0, 0, 1, 0], device=kernel.device)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=0.0)
    loss = policy_loss(
        logp, 0 * advantages, cu, ref_logp=old, beta=1.0, use_bias_correction_kl=False,
        backend=kernel.backend,
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(loss, logp)
    want = -torch.expm1(-gaps) / 4 * torch.tensor([1.0, 0, 1, 0], device=kernel.device)
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=0.0)


def test_a_ratio_on_the_bound_of_the_clip_keeps_its_whole_gradient(kernel):
    """Both sides of the minimum are equal there: half the gradient comes from each."""
    logp, _, cu, *_ = make(kernel, lengths=(1, 1, 1))
    advantages = torch.tensor([1.0, -1.0, 0.0], device=kernel.device)
    for delta in (None, 1.0):
        loss = policy_loss(
            logp, advantages, cu, old_logp=logp.detach(), epsilon=0.0, delta=delta,
            backend=kernel.backend,
        ).loss  # fmt: skip
        (grad,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close(grad, -advantages.to(grad) / 3)


def test_a_delta_below_the_clip_holds_for_both_signs(kernel):
    """Of a ratio of e the least is taken: 1.1, where the clip would have taken 1.2 of A > 0."""
    logp = torch.ones(2, device=kernel.device, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0], device=kernel.device)
    loss = policy_loss(
        logp, advantages, torch.arange(3), old_logp=torch.zeros_like(logp), epsilon=0.2, delta=1.1,
        backend=kernel.backend,
    ).loss  # fmt: skip
    (grad,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx((-1.1 + 1.2) / 2)
    assert not grad.any()


def test_a_token_without_a_finite_sampler_weight_leaves_both_sides_of_the_mean(kernel):
    logp, advantages, cu, old, _, _, ratio = make(kernel, lengths=(3, 3))
    bad = ratio.clone()
    bad[1], bad[4] = torch.nan, torch.inf
    tensors = {"old_logp": old, "backend": kernel.backend}
    got = policy_loss(logp, advantages, cu, sampler_ratio=bad, **tensors)
    keep = bad.isfinite()
    want = policy_loss(logp, advantages, cu, sampler_ratio=ratio, mask=keep, **tensors)
    assert torch.equal(got.loss, want.loss)
    assert got.metrics["sampling/dropped_tokens"].item() == 2
    assert want.metrics["sampling/dropped_tokens"].item() == 0
    got = policy_loss(logp, advantages, cu, sampler_ratio=bad, mask=keep, **tensors)
    assert got.metrics["sampling/dropped_tokens"].item() == 0


def test_vespo_clamps_each_factor_before_their_product(kernel):
    """exp(20) and exp(-20), then 1e8 and a sampler's weight of 0 that counts as 1e-8: both 1."""
    for gaps, weights in (((30.0, -25.0), (1.0, 1.0)), ((math.log(1e8), 0.0), (1.0, 0.0))):
        old = -torch.tensor(gaps, device=kernel.device)
        metrics = policy_loss(
            torch.zeros_like(old), old.new_ones(1), torch.tensor([0, 2]), old_logp=old,
            sampler_ratio=old.new_tensor(weights), loss_type="vespo", vespo_lambda_pos=0.5,
            backend=kernel.backend,
        ).metrics  # fmt: skip
        assert metrics["vespo/phi_seq_mean"].item() == pytest.approx(1, abs=1e-5)


def test_clip_sides(kernel):
    """Only a ratio above with A > 0, or below with A < 0, is clipped and loses its gradient."""
    old = torch.zeros(4, device=kernel.device)
    logp = torch.tensor([0.5, 0.5, -0.5, -0.5], device=kernel.device, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], device=kernel.device)
    out = policy_loss(
        logp, advantages, torch.arange(5), old_logp=old, epsilon=0.1, epsilon_high=0.3,
        backend=kernel.backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert (grad != 0).tolist() == [False, True, True, False]
    assert out.metrics["clip_ratio/high_mean"] == out.metrics["clip_ratio/low_mean"] == 0.25
    assert out.metrics["clip_ratio/region_mean"] == 0.5
    assert out.metrics["clip_ratio/high_max"] == 1 and out.metrics["clip_ratio/low_min"] == 0
    want = (-1.3 + torch.tensor(0.5).exp() - torch.tensor(-0.5).exp() + 0.9) / 4
    torch.testing.assert_close(out.loss.detach().cpu(), want)


@pytest.mark.parametrize(
    "sign,names", [(1, ("high_max", "high_mean")), (-1, ("low_min", "low_mean"))]
)
def test_the_least_and_greatest_clip_share_leave_out_completions_without_tokens(
    kernel, sign, names
):
    logp = torch.ones(5, device=kernel.device)
    old = logp - sign * torch.tensor([1.0, 1, 1, 0, 5], device=kernel.device)
    out = policy_loss(
        logp, sign * torch.tensor([1.0, -1.0, -1.0], device=kernel.device),
        torch.tensor([0, 4, 4, 5]), old_logp=old, backend=kernel.backend,
        mask=torch.tensor([True, True, False, True, False], device=kernel.device),
    )  # fmt: skip
    for name in names:
        assert out.metrics[f"clip_ratio/{name}"].item() == pytest.approx(2 / 3)


def test_sequence_level_metrics_count_completions_not_tokens(kernel):
    logp = torch.ones(4, device=kernel.device)
    advantages = torch.tensor([1.0, -1.0], device=kernel.device)
    kwargs = {
        "old_logp": torch.zeros_like(logp), "importance_sampling_level": "sequence",
        "backend": kernel.backend,
    }  # fmt: skip
    cu = torch.tensor([0, 3, 4])
    out = policy_loss(logp, advantages, cu, **kwargs)
    assert out.metrics["clip_ratio/high_mean"] == 0.5
    out = policy_loss(logp, advantages, cu, loss_type="cispo", epsilon_high=2.0, **kwargs)
    assert out.metrics["cispo_clip_ratio"] == 0.5


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", LEVELS)
def test_kernel_metrics_equal_those_of_plain_torch(kernel, loss_type, level):
    logp, advantages, cu, old, ref, mask, ratio = make(kernel, spread=1.0)
    ratio[2] = torch.nan
    old[3] -= 300
    kwargs = {
        "old_logp": old, "ref_logp": ref, "mask": mask, "sampler_ratio": ratio, "entropy": -ref,
        "beta": 0.1, "loss_type": loss_type, "importance_sampling_level": level,
    }  # fmt: skip
    got = policy_loss(logp, advantages, cu, backend=kernel.backend, **kwargs).metrics
    want = policy_loss(logp.double(), advantages, cu, backend="torch", **kwargs).metrics
    assert list(got) == list(want)
    for name, value in got.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-7)


def test_entropy_is_averaged_over_unmasked_tokens(kernel):
    logp, advantages, cu, *_ = make(kernel, lengths=(2, 2))
    entropy = torch.tensor([1.0, 2, 3, 100], device=kernel.device)
    mask = torch.tensor([True, True, True, False], device=kernel.device)
    out = policy_loss(logp, advantages, cu, entropy=entropy, mask=mask, backend=kernel.backend)
    assert out.metrics["entropy"].item() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_gets_a_gradient_of_its_own_type(kernel, dtype):
    logp, advantages, cu, old, *_ = make(kernel)
    half = logp.detach().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    grads = []
    for x in (half, full):
        loss = policy_loss(x, advantages, cu, old_logp=old, backend=kernel.backend).loss
        assert loss.dtype == torch.float32
        grads += torch.autograd.grad(3 * loss, x)
    assert torch.equal(grads[0], grads[1].to(dtype))


def test_offsets_of_32_bits_and_strided_inputs_change_nothing(kernel):
    logp, advantages, cu, old, ref, mask, _ = make(kernel)
    kwargs = {"beta": 0.1, "backend": kernel.backend}
    want = policy_loss(logp, advantages, cu, old_logp=old, ref_logp=ref, mask=mask, **kwargs)
    logp, old, ref, mask = (torch.stack([x, x], 1)[:, 0] for x in (logp, old, ref, mask))
    got = policy_loss(logp, advantages, cu.int(), old_logp=old, ref_logp=ref, mask=mask, **kwargs)
    assert torch.equal(got.loss, want.loss)


def trl_trainer(options):
    """As much of a TRL trainer as its loss looks at; it returns ``inputs["logp"]`` as logp."""
    from trl import GRPOTrainer

    class Stub:
        _compute_loss = GRPOTrainer._compute_loss
        get_gamma_weights = staticmethod(GRPOTrainer.get_gamma_weights)

        def _get_per_token_logps_and_entropies(self, model, *_, **__):
            return model, -model.detach(), None

    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    values = {
        **options.to_dict(), "epsilon_low": options.epsilon, "epsilon_high": options.upper,
        "use_vllm": True, "vllm_importance_sampling_correction": True, "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
        "accelerator": accelerator, "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(**options.to_dict(), steps_per_generation=1),
        "_metrics": {"train": defaultdict(list)},
    }  # fmt: skip
    stub = Stub()
    stub.__dict__.update(values)
    return stub


@pytest.mark.peer
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_loss_gradient_and_metrics_equal_those_of_trl(loss_type, level):
    pytest.importorskip("trl")
    g = torch.Generator().manual_seed(1)
    B, T = 4, 6
    logp = (-3 * torch.rand(B, T, generator=g).double()).requires_grad_()
    old, ref = (logp.detach() + 0.4 * torch.randn(B, T, generator=g).double() for _ in range(2))
    ratio = (0.3 * torch.randn(B, T, generator=g).double()).exp()
    advantages = torch.randn(B, generator=g).double()
    lengths = torch.tensor([6, 3, 1, 5])
    completion_mask = torch.arange(T) < lengths[:, None]
    tool_mask = torch.rand(B, T, generator=g) < 0.7
    tool_mask[:, 0] = True  # TRL counts completions without tokens in its means
    ratio = torch.where(completion_mask & tool_mask, ratio, 1.0)  # as TRL computes it
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    for beta, corrected, delta in ((0.0, True, None), (0.1, True, 1.3), (0.1, False, None)):
        options = LossOptions(
            loss_type=loss_type, importance_sampling_level=level, beta=beta, delta=delta,
            use_bias_correction_kl=corrected, epsilon_high=0.3, max_completion_length=T,
        )  # fmt: skip
        trl = trl_trainer(options)
        ids = torch.zeros(B, T, dtype=torch.int64)
        want = trl._compute_loss(
            logp,
            {
                "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids,
                "completion_mask": completion_mask.long(), "tool_mask": tool_mask.long(),
                "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
                "importance_sampling_ratio": ratio,
                "num_items_in_batch": (completion_mask & tool_mask).sum(),
            },
        )  # fmt: skip
        got = policy_loss(
            logp[completion_mask], advantages, cu, old_logp=old[completion_mask],
            ref_logp=ref[completion_mask], mask=tool_mask[completion_mask],
            sampler_ratio=ratio[completion_mask], entropy=-logp.detach()[completion_mask],
            **options.to_dict(),
        )  # fmt: skip
        # TRL's sapo temperatures are float32 whatever the rest is.
        torch.testing.assert_close(got.loss, want, rtol=1e-7, atol=0.0)
        theirs, ours = (torch.autograd.grad(x, logp)[0] for x in (want, got.loss))
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
        names = set(got.metrics) - {"log_ratio_clamped", "sampling/dropped_tokens"}
        assert names == set(trl._metrics["train"])
        for name in names:
            want = trl._metrics["train"][name][0]
            assert got.metrics[name].item() == pytest.approx(want, rel=1e-6), name


def arguments(kernel):
    """Positional arguments of the custom operation."""
    logp, advantages, cu, old, ref, mask, ratio = make(kernel)
    options = LossOptions(loss_type="grpo", beta=0.1).to_numbers()
    return (logp, advantages, cu, torch.ones_like(logp[0]).detach(), old, ref, mask, ratio, None,
            options, kernel.backend)  # fmt: skip


def test_the_operation_is_a_good_citizen_of_torch_library(kernel):
    torch.library.opcheck(torch.ops.fusedgrpo.policy_loss.default, arguments(kernel))
    _, coefficient, _ = torch.ops.fusedgrpo.policy_loss(*arguments(kernel))
    torch.library.opcheck(
        torch.ops.fusedgrpo.policy_loss_backward.default, (coefficient.sum(), coefficient)
    )


def test_compiled_equals_eager(kernel):
    def step(logp, advantages, cu, old, mask, epsilon):
        out = policy_loss(logp, advantages, cu, old_logp=old, mask=mask, epsilon=epsilon,
                          loss_type="grpo", backend=kernel.backend)  # fmt: skip
        return 2 * out.loss, out.metrics["clip_ratio/region_mean"]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths, epsilon in (((5, 0, 3), 0.1), ((4, 2, 9), 0.3)):  # the second one is dynamic
        logp, advantages, cu, old, _, mask, _ = make(kernel, lengths)
        results = []
        for f in (step, compiled):
            loss, metric = f(logp, advantages, cu, old, mask, epsilon)
            results.append((loss, metric, *torch.autograd.grad(loss, logp)))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def test_a_second_derivative_is_refused(kernel):
    logp, advantages, cu, *_ = make(kernel)
    loss = policy_loss(logp, advantages, cu, backend=kernel.backend).loss
    (grad,) = torch.autograd.grad(loss * loss, logp, create_graph=True)
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        grad.sum().backward()


def test_without_grad_mode_the_loss_is_the_same(kernel):
    logp, advantages, cu, old, *_ = make(kernel)
    want = policy_loss(logp, advantages, cu, old_logp=old, backend=kernel.backend).loss
    with torch.no_grad():
        got = policy_loss(logp, advantages, cu, old_logp=old, backend=kernel.backend).loss
    assert want.requires_grad and not got.requires_grad
    assert torch.equal(got, want)


def test_options_survive_the_schema_of_the_operation():
    for options in (
        LossOptions(),
        LossOptions(loss_type="dr_grpo", importance_sampling_level="sequence", delta=2.0, beta=0.1,
                    epsilon_high=0.28, use_bias_correction_kl=False, max_completion_length=512),
    ):  # fmt: skip
        assert LossOptions.from_numbers(options.to_numbers()) == options


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
        ({"cu_seqlens": torch.tensor([0, 5, 5, 8, 9, 17])}, "N=16"),
        ({"cu_seqlens": torch.tensor([0, 8, 5, 8, 9, 16])}, "to rise"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_arguments_are_named(change, message):
    logp, advantages, cu, *_ = make(TORCH_CPU)
    with pytest.raises(ValueError, match=message):
        policy_loss(**{"logp": logp, "advantages": advantages, "cu_seqlens": cu, **change})


def test_triton_refuses_float64():
    logp, advantages, cu, *_ = make(TORCH_CPU)
    with pytest.raises(TypeError, match="logp is float64"):
        policy_loss(logp, advantages, cu, backend="triton")
