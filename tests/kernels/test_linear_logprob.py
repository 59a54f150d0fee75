"""linear_logprob against float64 with the logits materialised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import linear_logprob
from fusedgrpo.kernels import vocab_pass as tiles
from fusedgrpo.kernels.reference import reference_linear_logprob


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several row chunks and several vocabulary tiles with a ragged last one, at test sizes."""
    for module in (tiles, __import__("sys").modules["fusedgrpo.kernels.linear_logprob"]):
        monkeypatch.setattr(module, "tile_shape", lambda device_type: (5, 16))


def make(N=13, H=8, V=53, dtype=torch.float32, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[0], targets[-1] = 0, V - 1  # the first and the last tile
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25, "temperature": 1.3},
    {"softcap": 5.0},
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_all_gradients_equal_the_reference_in_float64(options, with_bias):
    hidden, weight, bias, targets = make(dtype=torch.float64)
    bias = bias if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    for x in inputs:
        x.requires_grad_()
    c, e = torch.randn(2, len(targets), dtype=torch.float64)

    got = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, **options)
    want = reference_linear_logprob(hidden, weight, targets, bias=bias, **options)
    torch.testing.assert_close(got.logp, want[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got.entropy, want[1], rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad((got.logp * c + got.entropy * e).sum(), inputs)
    theirs = torch.autograd.grad((want[0] * c + want[1] * e).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_the_operation_and_of_the_reference(options):
    hidden, weight, bias, targets = make(N=4, H=3, V=19, dtype=torch.float64)
    for x in (hidden, weight, bias):
        x.requires_grad_()

    def ours(h, w, b):
        return tuple(linear_logprob(h, w, targets, bias=b, return_entropy=True, **options))

    def reference(h, w, b):
        return reference_linear_logprob(h, w, targets, bias=b, **options)

    assert torch.autograd.gradcheck(ours, (hidden, weight, bias), nondet_tol=0.0)
    assert torch.autograd.gradcheck(reference, (hidden, weight, bias), nondet_tol=0.0)


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(0, 14), H=st.integers(1, 9), V=st.integers(1, 60),
    seed=st.integers(0, 99), masked=st.booleans(),
)  # fmt: skip
def test_any_shape_and_mask_equals_the_reference(N, H, V, seed, masked):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=g)
    mask = torch.rand(N, generator=g) < 0.5 if masked else None
    got = linear_logprob(hidden, weight, targets, mask=mask, return_entropy=True)
    want = reference_linear_logprob(hidden, weight, targets, mask=mask)
    torch.testing.assert_close(got.logp, want[0], atol=1e-11, rtol=1e-9)
    torch.testing.assert_close(got.entropy, want[1], atol=1e-11, rtol=1e-9)
    loss = got.logp.sum() + got.entropy.sin().sum()
    other = want[0].sum() + want[1].sin().sum()
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(other, (hidden, weight), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_masked_positions_are_exactly_zero_in_value_and_gradient():
    hidden, weight, _, targets = make()
    hidden.requires_grad_()
    mask = torch.arange(len(targets)) % 3 != 0
    targets = torch.where(mask, targets, 10**9)  # never looked at
    out = linear_logprob(hidden, weight, targets, mask=mask, return_entropy=True)
    (out.logp.sum() + out.entropy.sum()).backward()
    for x in (out.logp[~mask], out.entropy[~mask], hidden.grad[~mask]):
        assert torch.equal(x, torch.zeros_like(x))
    assert (hidden.grad[mask].abs().sum(1) > 0).all()


def _bf16_cases():
    """Flat, peaked (top logits 16-31, as sharp models have) and collapsed rows."""
    g = torch.Generator().manual_seed(1)
    N, H, V = 24, 64, 333
    for kind in ("flat", "peaked", "collapsed"):
        weight = torch.randn(V, H, generator=g) / H**0.5
        targets = torch.randint(0, V, (N,), generator=g)
        hidden = torch.randn(N, H, generator=g)
        if kind != "flat":
            unit = torch.nn.functional.normalize(weight, dim=1)
            level = torch.linspace(
                16 if kind == "peaked" else 22, 31 if kind == "peaked" else 30, N
            )[:, None]
            hidden = unit[targets] * level / weight.norm(dim=1)[targets][:, None] + 0.3 * hidden
            if kind == "peaked":  # and a close competitor
                hidden += unit[(targets + 1) % V] * level * 0.9
        yield kind, hidden.bfloat16(), weight.bfloat16(), targets


@pytest.mark.parametrize(
    "kind,hidden,weight,targets", list(_bf16_cases()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_bfloat16_meets_the_error_bars(kind, hidden, weight, targets):
    exact_hidden = hidden.double().requires_grad_()
    exact = reference_linear_logprob(exact_hidden, weight.double(), targets)[0]
    coefficient = torch.randn(len(targets))
    (exact * coefficient.double()).sum().backward()

    ours_hidden = hidden.clone().requires_grad_()
    ours = linear_logprob(ours_hidden, weight, targets).logp
    (ours * coefficient).sum().backward()
    assert (ours - exact).abs().max() <= 1e-5
    error = (ours_hidden.grad.double() - exact_hidden.grad).norm(dim=1)
    assert error.norm() / exact_hidden.grad.norm() <= 2.8e-3
    assert (error / exact_hidden.grad.norm(dim=1)).max() <= 5e-3
    if kind == "collapsed":
        assert exact.abs().min() < 1e-7, "the case must hold tokens with p > 1 - 1e-7"


def test_float32_error_stays_under_1e_5():
    hidden, weight, bias, targets = make(N=64, H=32, V=400)
    hidden.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = reference_linear_logprob(exact_hidden, weight.double(), targets, bias=bias.double())[0]
    ours = linear_logprob(hidden, weight, targets, bias=bias).logp
    exact.sum().backward()
    ours.sum().backward()
    assert (ours - exact).abs().max() <= 1e-5
    assert (hidden.grad - exact_hidden.grad).norm() / exact_hidden.grad.norm() <= 1e-5


def test_the_pass_without_gradients_gives_the_same_bits():
    hidden, weight, _, targets = make(N=40, V=90)
    with torch.no_grad():
        silent = linear_logprob(hidden, weight, targets, return_entropy=True)
    hidden.requires_grad_()
    loud = linear_logprob(hidden, weight, targets, return_entropy=True)
    assert torch.equal(silent.logp, loud.logp)
    assert torch.equal(silent.entropy, loud.entropy)


def test_it_is_deterministic():
    hidden, weight, _, targets = make(N=40, V=90)
    hidden.requires_grad_()
    runs = [
        torch.autograd.grad(linear_logprob(hidden, weight, targets).logp.sum(), hidden)[0]
        for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("shift", [-1e4, 1e3])
def test_logits_far_from_zero_cost_nothing(shift):
    """verl#2899 and SkyRL#2141: a maximum that starts at 0, or phantom columns, show up here."""
    hidden, weight, _, targets = make(dtype=torch.float64)
    bias = torch.full((len(weight),), shift, dtype=torch.float64)
    got = linear_logprob(hidden, weight, targets, bias=bias).logp
    torch.testing.assert_close(got, linear_logprob(hidden, weight, targets).logp, atol=1e-9, rtol=0)


def test_transposed_weight_and_strided_hidden():
    hidden, weight, _, targets = make()
    want = linear_logprob(hidden, weight, targets).logp
    strided = torch.stack([hidden, hidden], 1)[:, 0]
    got = linear_logprob(strided, weight.T.contiguous().T, targets).logp
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_leading_dimensions_are_kept():
    hidden, weight, _, targets = make(N=12)
    out = linear_logprob(hidden.view(3, 4, -1), weight, targets.view(3, 4), return_entropy=True)
    assert out.logp.shape == out.entropy.shape == (3, 4)
    assert torch.equal(out.logp.view(-1), linear_logprob(hidden, weight, targets).logp)


def test_zero_rows_and_all_masked_stay_connected_to_the_graph():
    hidden, weight, _, targets = make(N=3)
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, targets, mask=torch.zeros(3, dtype=torch.bool))
    out.logp.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert linear_logprob(hidden[:0], weight, targets[:0]).logp.shape == (0,)


def test_entropy_is_none_unless_asked_and_detached_on_request():
    hidden, weight, _, targets = make()
    hidden.requires_grad_()
    assert linear_logprob(hidden, weight, targets).entropy is None
    assert linear_logprob(hidden, weight, targets, return_entropy=True).entropy.requires_grad
    assert not linear_logprob(
        hidden, weight, targets, return_entropy="detached"
    ).entropy.requires_grad


def test_under_autocast_both_operands_are_cast():
    hidden, weight, _, targets = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logprob(hidden, weight, targets).logp
    assert torch.equal(got, linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets).logp)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("bad", [-1, 53, 2**40])
def test_a_target_outside_the_vocabulary_is_named(bad):
    hidden, weight, _, targets = make()
    targets[3] = bad
    with pytest.raises(IndexError, match=f"target id {bad} is outside the vocabulary of 53"):
        linear_logprob(hidden, weight, targets)


def test_a_second_derivative_is_refused():
    hidden, weight, _, targets = make(N=2)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_logprob(hidden, weight, targets).logp.square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_options_are_named(change, message):
    hidden, weight, _, targets = make()
    with pytest.raises(ValueError, match=message):
        linear_logprob(hidden, weight, targets, **change)


def test_bad_shapes_and_dtypes_are_named():
    hidden, weight, bias, targets = make()
    with pytest.raises(ValueError, match="hidden has shape"):
        linear_logprob(hidden[:, 1:], weight, targets)
    with pytest.raises(ValueError, match="targets has shape"):
        linear_logprob(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="bias has shape"):
        linear_logprob(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(TypeError, match="one floating dtype"):
        linear_logprob(hidden.bfloat16(), weight, targets)


def test_triton_by_name_is_an_error_where_there_is_no_kernel():
    hidden, weight, _, targets = make()
    with pytest.raises(RuntimeError, match="no Triton kernel"):
        linear_logprob(hidden, weight, targets, backend="triton")
