"""linear_policy_loss against policy_loss of linear_logprob, and against float64 with the logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import (
    LOSS_TYPES,
    LossOptions,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
)
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.launch import Tiling
from fusedgrpo.kernels.logprob import vocab_pass
from fusedgrpo.kernels.reference import reference_linear_logprob, reference_policy_loss

HEAD = {"softcap": 5.0, "temperature": 0.7, "logit_scale": 2.0}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Chunks of five rows, so that completions are cut and at level "sequence" do not fit."""
    sizes = Tiling(rows=7, columns=32, head_columns=24, stored_rows=5)
    monkeypatch.setattr(vocab_pass, "tiling", lambda *shape: sizes)


def exact_dtype(kernel):
    return (torch.float64, 1e-11) if kernel.backend == "torch" else (torch.float32, 1e-5)


def make(lengths, kernel, dtype, H=8, V=53, seed=0):
    """Hidden states, head and everything the loss takes; completion 1 has advantage 0."""
    g = torch.Generator().manual_seed(seed)
    N, B = sum(lengths), len(lengths)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(kernel.device, dtype)
        for shape in ((N, H), (V, H), (V,))
    )
    targets = torch.randint(0, V, (N,), generator=g).to(kernel.device)
    advantages = torch.randn(B, generator=g, dtype=torch.float64).to(kernel.device, dtype)
    advantages[1:2] = 0.0
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=kernel.device)
    near = reference_linear_logprob(
        hidden.double(), weight.double(), targets, bias=bias.double(), **HEAD
    )[0].to(dtype)
    noise = 0.3 * torch.randn(3, N, generator=g, dtype=torch.float64).to(kernel.device, dtype)
    tensors = {
        "old_logp": near + noise[0],
        "ref_logp": near + noise[1],
        "sampler_ratio": (1 + noise[2]).clamp(min=0.1),
    }
    return hidden, weight, bias, targets, advantages, ends, tensors


LENGTHS = [3, 5, 1, 0, 8] if interpreted() else [3, 9, 1, 0, 12, 6]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_it_is_the_policy_loss_of_the_log_probs(kernel, loss_type, level):
    if interpreted() and loss_type not in ("grpo", "dapo", "vespo"):
        pytest.skip("slow, and test_policy_loss.py has them all")
    dtype, tolerance = exact_dtype(kernel)
    hidden, weight, bias, targets, advantages, ends, tensors = make(LENGTHS, kernel, dtype)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    mask = torch.rand(len(targets), device=kernel.device) < 0.8
    options = LossOptions(
        loss_type=loss_type, importance_sampling_level=level, beta=0.1, max_completion_length=20
    )
    logp, entropy = linear_logprob(
        *inputs[:2], targets, bias=bias, mask=mask, return_entropy=True,
        backend=kernel.backend, **HEAD,
    )  # fmt: skip
    want = policy_loss(
        logp, advantages, ends, mask=mask, entropy=entropy, backend=kernel.backend,
        **tensors, **options.to_dict(),
    )  # fmt: skip
    got = linear_policy_loss(
        *inputs[:2], targets, advantages, ends, options=options, bias=bias, mask=mask,
        return_entropy=True, backend=kernel.backend, **tensors, **HEAD,
    )  # fmt: skip
    torch.testing.assert_close(got.loss, want.loss, rtol=tolerance, atol=tolerance)
    assert got.metrics.keys() == want.metrics.keys()
    for name in want.metrics:
        torch.testing.assert_close(
            got.metrics[name], want.metrics[name], rtol=tolerance, atol=tolerance
        )
    ours = torch.autograd.grad(got.loss * 3, inputs)
    theirs = torch.autograd.grad(want.loss * 3, inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=tolerance)


@settings(
    max_examples=4 if interpreted() else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.integers(0, 13), min_size=1, max_size=5),
    level=st.sampled_from(["token", "sequence"]),
    loss_type=st.sampled_from(["grpo", "dapo", "vespo"]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_lengths_and_masks_equal_the_reference(kernel, lengths, level, loss_type, masked, seed):
    dtype, tolerance = exact_dtype(kernel)
    hidden, weight, _, targets, advantages, ends, tensors = make(lengths, kernel, dtype, seed=seed)
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(len(targets), generator=g) < 0.6).to(kernel.device) if masked else None
    options = LossOptions(loss_type=loss_type, importance_sampling_level=level, beta=0.05)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    got = linear_policy_loss(
        *inputs, targets, advantages, ends, options=options, mask=mask,
        backend=kernel.backend, **tensors, **HEAD,
    )  # fmt: skip
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = reference_policy_loss(
        reference_linear_logprob(*exact, targets, **HEAD)[0],
        advantages.double(), ends, options=options, mask=mask,
        **{k: x.double() for k, x in tensors.items()},
    )  # fmt: skip
    torch.testing.assert_close(got.loss.double(), want, rtol=tolerance, atol=tolerance)
    ours = torch.autograd.grad(got.loss, inputs)
    theirs = torch.autograd.grad(want, exact, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        b = torch.zeros_like(a).double() if b is None else b
        # To a share of the largest entry: those near 0 are sums of large ones.
        scale = max(b.abs().max().item(), 1.0) if b.numel() else 1.0
        assert not b.numel() or (a.double() - b).abs().max() <= tolerance * scale


def test_each_input_alone_may_need_a_gradient(kernel):
    dtype, tolerance = exact_dtype(kernel)
    hidden, weight, bias, targets, advantages, ends, tensors = make(LENGTHS, kernel, dtype)

    def gradients(*trained):
        inputs = {"hidden": hidden, "weight": weight, "bias": bias}
        inputs = {k: x.detach().requires_grad_(k in trained) for k, x in inputs.items()}
        out = linear_policy_loss(
            inputs["hidden"], inputs["weight"], targets, advantages, ends,
            options=LossOptions(), bias=inputs["bias"], old_logp=tensors["old_logp"],
            backend=kernel.backend,
        )  # fmt: skip
        return dict(
            zip(trained, torch.autograd.grad(out.loss, [inputs[k] for k in trained]), strict=True)
        )

    together = gradients("hidden", "weight", "bias")
    for name in ("hidden", "weight", "bias"):
        alone = gradients(name)[name]
        torch.testing.assert_close(alone, together[name], rtol=tolerance, atol=tolerance)


def test_rows_without_a_coefficient_get_exactly_zero(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make(LENGTHS, kernel, torch.float32)
    hidden.requires_grad_()
    linear_policy_loss(
        hidden, weight, targets, advantages, ends, options=LossOptions(), backend=kernel.backend
    ).loss.backward()
    zero = slice(ends[1].item(), ends[2].item())  # advantage 0
    assert torch.equal(hidden.grad[zero], torch.zeros_like(hidden.grad[zero]))
    others = torch.cat([hidden.grad[: zero.start], hidden.grad[zero.stop :]])
    assert (others.abs().sum(1) > 0).all()


def test_the_first_step_has_ratio_one_and_no_kl_exactly(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make(LENGTHS, kernel, torch.float32)
    with torch.no_grad():
        before = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    hidden.requires_grad_()
    logp = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    metrics = policy_loss(
        logp, advantages, ends, old_logp=before, ref_logp=before, beta=0.1, delta=1.0,
        epsilon=0.0, epsilon_high=0.0, backend=kernel.backend,
    ).metrics  # fmt: skip
    assert metrics["kl"] == 0
    assert metrics["clip_ratio/region_mean"] == 0, "epsilon 0 clips every ratio that is not 1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_the_exact_gradient_once(kernel, dtype):
    """Rounding the exact gradient to bfloat16 costs 1.7e-3, and dz is rounded too."""
    if interpreted():
        pytest.skip("the interpreter truncates where a GPU rounds to bfloat16")
    hidden, weight, _, targets, advantages, ends, _ = make([20, 30, 25], kernel, dtype, H=64, V=333)
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    options = LossOptions(loss_type="dapo")
    scale = 2.0**16  # as a loss scale does
    want = reference_policy_loss(
        reference_linear_logprob(exact, weight.double(), targets)[0],
        advantages.double(), ends, options=options, num_items=1e7,
    )  # fmt: skip
    (want * scale).backward()
    with vocab_pass.probabilities_as(dtype):
        got = linear_policy_loss(
            hidden, weight, targets, advantages, ends, options=options, num_items=1e7,
            backend=kernel.backend,
        )  # fmt: skip
    (got.loss * scale).backward()
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error <= (2.2e-3 if dtype == torch.bfloat16 else 4e-4)


def test_a_trained_low_precision_head_keeps_small_coefficients(kernel):
    if interpreted():
        pytest.skip("the interpreter truncates where a GPU rounds to bfloat16")
    hidden, weight, bias, targets, advantages, ends, _ = make(LENGTHS, kernel, torch.float16)
    trained = [weight.requires_grad_(), bias.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in trained]
    want = reference_policy_loss(
        reference_linear_logprob(hidden.double(), exact[0], targets, bias=exact[1])[0],
        advantages.double(), ends, options=LossOptions(), num_items=1e7,
    )  # fmt: skip
    (want * 2.0**16).backward()
    got = linear_policy_loss(
        hidden, trained[0], targets, advantages, ends, options=LossOptions(), num_items=1e7,
        bias=trained[1], backend=kernel.backend,
    )  # fmt: skip
    (got.loss * 2.0**16).backward()
    for a, b in zip(trained, exact, strict=True):
        assert (a.grad.double() - b.grad).norm() <= 1e-3 * b.grad.norm()


def test_a_sure_token_keeps_its_gradient(kernel):
    """1 minus a float32 p knows nothing of a 1 - p of 1e-8: of the row's whole gradient."""
    weight = torch.eye(20, device=kernel.device)  # the logits are the hidden states
    targets = torch.arange(0, 20, 3, device=kernel.device)
    sure = torch.linspace(12.0, 21.0, len(targets), device=kernel.device)
    hidden = 0.1 * torch.randn(len(targets), 20, device=kernel.device)
    hidden = (hidden + weight[targets] * sure[:, None]).requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    advantages = torch.tensor([1.0, -1.0], device=kernel.device)
    ends = torch.tensor([0, 3, len(targets)], device=kernel.device)
    linear_policy_loss(
        hidden, weight, targets, advantages, ends, options=LossOptions(), backend=kernel.backend
    ).loss.backward()
    reference_policy_loss(
        reference_linear_logprob(exact, weight.double(), targets)[0],
        advantages.double(), ends, options=LossOptions(),
    ).backward()  # fmt: skip
    error = (hidden.grad - exact.grad).norm(dim=1)
    assert (error <= 1e-5 * exact.grad.norm(dim=1)).all()


def test_a_token_without_a_finite_sampler_weight_is_as_good_as_masked(kernel):
    dtype, _ = exact_dtype(kernel)
    hidden, weight, _, targets, advantages, ends, tensors = make(LENGTHS, kernel, dtype)
    hidden.requires_grad_()
    keep = torch.arange(len(targets), device=kernel.device) % 3 != 0

    def run(**keywords):
        loss = linear_policy_loss(
            hidden, weight, targets, advantages, ends, options=LossOptions(loss_type="grpo"),
            backend=kernel.backend, **keywords,
        ).loss  # fmt: skip
        return loss, *torch.autograd.grad(loss, hidden)

    ratio = tensors["sampler_ratio"]
    dropped = run(sampler_ratio=ratio.where(keep, torch.nan))
    for a, b in zip(dropped, run(sampler_ratio=ratio, mask=keep), strict=True):
        assert torch.equal(a, b)


def test_without_gradients_it_gives_the_same_loss(kernel):
    hidden, weight, _, targets, advantages, ends, tensors = make(LENGTHS, kernel, torch.float32)
    arguments = (targets, advantages, ends)
    options = LossOptions(importance_sampling_level="sequence")
    keywords = {"options": options, "old_logp": tensors["old_logp"], "backend": kernel.backend}
    silent = linear_policy_loss(hidden, weight, *arguments, **keywords)
    loud = linear_policy_loss(hidden.requires_grad_(), weight, *arguments, **keywords)
    assert not silent.loss.requires_grad
    torch.testing.assert_close(silent.loss, loud.loss, rtol=1e-6, atol=1e-7)


def test_everything_masked_is_zero_and_connected(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make(LENGTHS, kernel, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_policy_loss(
        hidden, weight, targets.fill_(-100), advantages, ends, options=LossOptions(),
        mask=torch.zeros_like(targets).bool(), backend=kernel.backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_no_tokens_at_all(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make([0, 0], kernel, torch.float32)
    out = linear_policy_loss(
        hidden.requires_grad_(), weight, targets, advantages, ends, options=LossOptions(),
        backend=kernel.backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.shape == hidden.shape


def test_a_token_that_is_not_finite_is_not_hidden(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make(LENGTHS, kernel, torch.float32)
    hidden[0] = torch.nan
    out = linear_policy_loss(
        hidden.requires_grad_(), weight, targets, advantages, ends, options=LossOptions(),
        backend=kernel.backend,
    )  # fmt: skip
    out.loss.backward()
    assert not out.loss.isfinite() and not hidden.grad[0].isfinite().all()


def test_bad_input_is_named(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make([3, 4], kernel, torch.float32)
    options = LossOptions()
    with pytest.raises(ValueError, match=r"expected \[N, H\]"):
        linear_policy_loss(hidden[None], weight, targets, advantages, ends, options=options)
    with pytest.raises(ValueError, match="one more than there are advantages"):
        linear_policy_loss(hidden, weight, targets, advantages, ends[1:], options=options)
    with pytest.raises(ValueError, match="expected to rise from 0 to N=7"):
        linear_policy_loss(hidden, weight, targets, advantages, ends + 1, options=options)
    with pytest.raises(IndexError, match="target id 99"):
        linear_policy_loss(hidden, weight, targets * 0 + 99, advantages, ends, options=options)
    with pytest.raises(ValueError, match="needs ref_logp"):
        linear_policy_loss(hidden, weight, targets, advantages, ends, options=LossOptions(beta=0.1))
    with pytest.raises(ValueError, match="old_logp has shape"):
        linear_policy_loss(
            hidden, weight, targets, advantages, ends, options=options, old_logp=hidden
        )


def test_a_second_derivative_is_refused(kernel):
    hidden, weight, _, targets, advantages, ends, _ = make([3, 4], kernel, torch.float32)
    hidden.requires_grad_()
    out = linear_policy_loss(
        hidden, weight, targets, advantages, ends, options=LossOptions(), backend=kernel.backend
    )
    (grad,) = torch.autograd.grad(out.loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()
