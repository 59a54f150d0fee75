"""linear_logprob against float64 with the logits materialised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import linear_logprob
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.launch import Tiling
from fusedgrpo.kernels.logprob import vocab_pass
from fusedgrpo.kernels.reference import reference_linear_logprob

# Several row chunks and several vocabulary tiles with a ragged last one, at test sizes.
SMALL = Tiling(rows=5, columns=16, head_columns=12, stored_rows=5)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(vocab_pass, "tiling", lambda H, V, itemsize, device_type: SMALL)


def exact_dtype(kernel):
    """The widest dtype of an implementation, and how far from float64 its results may be."""
    return (torch.float64, 1e-10) if kernel.backend == "torch" else (torch.float32, 3e-6)


ROWS = 7 if interpreted() else 13


def make(N=ROWS, H=8, V=53, dtype=torch.float32, scale=1.0, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=torch.float64) * scale
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[0], targets[-1] = 0, V - 1  # the first and the last tile
    return (*(x.to(device, dtype) for x in (hidden, weight, bias)), targets.to(device))


def close(got, want, tolerance):
    """Equal to a share of the largest value: entries near 0 are sums of large ones."""
    want = want.to(got.dtype)
    scale = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * max(scale, 1.0))


OPTIONS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25, "temperature": 1.3},
    {"softcap": 5.0},
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_all_gradients_equal_the_reference(kernel, options, with_bias):
    dtype, tolerance = exact_dtype(kernel)
    hidden, weight, bias, targets = make(dtype=dtype, device=kernel.device)
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    exact = [x.double().requires_grad_() for x in inputs]
    for x in inputs:
        x.requires_grad_()
    c, e = torch.randn(2, len(targets), dtype=dtype).to(kernel.device)

    got = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias if with_bias else None,
        return_entropy=True,
        backend=kernel.backend,
        **options,
    )
    want = reference_linear_logprob(
        exact[0], exact[1], targets, bias=exact[2] if with_bias else None, **options
    )
    close(got.logp, want[0], tolerance)
    close(got.entropy, want[1], tolerance)
    ours = torch.autograd.grad((got.logp * c + got.entropy * e).sum(), inputs)
    theirs = torch.autograd.grad((want[0] * c + want[1] * e).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, tolerance)


@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("output", ["logp", "entropy"])
def test_each_gradient_alone_from_each_output_alone(kernel, wanted, output):
    """TRL#6625 lost the gradient of the entropy; a head that trains alone needs no u."""
    dtype, tolerance = exact_dtype(kernel)
    hidden, weight, bias, targets = make(dtype=dtype, device=kernel.device)
    inputs = {"hidden": hidden, "weight": weight, "bias": bias}
    exact = {name: x.double() for name, x in inputs.items()}
    inputs[wanted].requires_grad_()
    exact[wanted].requires_grad_()
    got = linear_logprob(
        hidden, weight, targets, bias=bias, return_entropy=True, backend=kernel.backend
    )
    want = reference_linear_logprob(exact["hidden"], exact["weight"], targets, bias=exact["bias"])
    c = torch.randn(len(targets), dtype=dtype).to(kernel.device)
    index = ("logp", "entropy").index(output)
    (ours,) = torch.autograd.grad((got[index] * c).sum(), inputs[wanted])
    (theirs,) = torch.autograd.grad((want[index] * c).sum(), exact[wanted])
    close(ours, theirs, tolerance)


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


@settings(
    max_examples=5 if interpreted() else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    N=st.integers(0, 14), H=st.integers(1, 9), V=st.integers(1, 60),
    seed=st.integers(0, 99), masked=st.booleans(),
)  # fmt: skip
def test_any_shape_and_mask_equals_the_reference(kernel, N, H, V, seed, masked):
    dtype, tolerance = exact_dtype(kernel)
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g, dtype=dtype).to(kernel.device).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=dtype).to(kernel.device).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=g).to(kernel.device)
    mask = (torch.rand(N, generator=g) < 0.5).to(kernel.device) if masked else None
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    got = linear_logprob(
        hidden, weight, targets, mask=mask, return_entropy=True, backend=kernel.backend
    )
    want = reference_linear_logprob(*exact, targets, mask=mask)
    close(got.logp, want[0], tolerance)
    close(got.entropy, want[1], tolerance)
    loss = got.logp.sum() + got.entropy.sin().sum()
    other = want[0].sum() + want[1].sin().sum()
    ours = torch.autograd.grad(loss, (hidden, weight))
    theirs = torch.autograd.grad(other, exact, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 3 * tolerance)


def test_masked_positions_are_exactly_zero_in_value_and_gradient(kernel):
    hidden, weight, _, targets = make(device=kernel.device)
    hidden.requires_grad_()
    mask = torch.arange(len(targets), device=kernel.device) % 3 != 0
    targets = torch.where(mask, targets, 10**9)  # never looked at
    out = linear_logprob(
        hidden, weight, targets, mask=mask, return_entropy=True, backend=kernel.backend
    )
    (out.logp.sum() + out.entropy.sum()).backward()
    for x in (out.logp[~mask], out.entropy[~mask], hidden.grad[~mask]):
        assert torch.equal(x, torch.zeros_like(x))
    assert (hidden.grad[mask].abs().sum(1) > 0).all()


def test_masked_positions_add_nothing_to_the_gradients_of_the_head(kernel):
    hidden, weight, bias, targets = make(device=kernel.device)
    mask = torch.arange(len(targets), device=kernel.device) % 3 != 0
    weight.requires_grad_()
    bias.requires_grad_()
    grads = []
    for h, t, m in ((hidden, targets, mask), (hidden[mask], targets[mask], None)):
        out = linear_logprob(
            h, weight, t, bias=bias, mask=m, return_entropy=True, backend=kernel.backend
        )
        grads.append(torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (weight, bias)))
    for a, b in zip(*grads, strict=True):
        close(a, b, 3e-6)


def test_a_sure_token_keeps_its_gradient(kernel):
    """1 minus a float32 p knows nothing of a 1 - p of 1e-8: of the row's whole gradient."""
    weight = torch.eye(20, device=kernel.device)  # the logits are the hidden states
    targets = torch.arange(0, 20, 3, device=kernel.device)
    sure = torch.linspace(12.0, 21.0, len(targets), device=kernel.device)
    hidden = (
        0.1 * torch.randn(len(targets), 20, device=kernel.device) + weight[targets] * sure[:, None]
    )
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = linear_logprob(*inputs, targets, backend=kernel.backend).logp
    want = reference_linear_logprob(*exact, targets)[0]
    ours, head = torch.autograd.grad(got.sum(), inputs)
    exact_ours, exact_head = torch.autograd.grad(want.sum(), exact)
    for a, b in ((ours, exact_ours), (head[targets], exact_head[targets])):
        assert ((a - b).norm(dim=1) <= 1e-5 * b.norm(dim=1)).all()


def _bf16_cases():
    """Flat, peaked (top logits 16-31, as sharp models have) and collapsed rows."""
    g = torch.Generator().manual_seed(1)
    N, H, V = 8 if interpreted() else 24, 64, 333
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


@pytest.mark.parametrize("gpu_arithmetic", [False, True])
@pytest.mark.parametrize(
    "kind,hidden,weight,targets", list(_bf16_cases()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_bfloat16_meets_the_error_bars(kernel, kind, hidden, weight, targets, gpu_arithmetic):
    if gpu_arithmetic and (interpreted() or kernel.device.type == "cuda"):
        pytest.skip("emulates on the CPU what a GPU does anyway")
    hidden, weight, targets = (x.to(kernel.device) for x in (hidden, weight, targets))
    exact_hidden = hidden.double().requires_grad_()
    exact = reference_linear_logprob(exact_hidden, weight.double(), targets)[0]
    coefficient = torch.randn(len(targets)).to(kernel.device)
    (exact * coefficient.double()).sum().backward()

    ours_hidden = hidden.clone().requires_grad_()
    with vocab_pass.probabilities_as(torch.bfloat16 if gpu_arithmetic else torch.float64):
        ours = linear_logprob(ours_hidden, weight, targets, backend=kernel.backend).logp
    (ours * coefficient).sum().backward()
    assert (ours - exact).abs().max() <= 1e-5
    if interpreted():
        return  # the interpreter truncates where a GPU rounds to bfloat16: u is off by a factor 2
    error = (ours_hidden.grad.double() - exact_hidden.grad).norm(dim=1)
    assert error.norm() / exact_hidden.grad.norm() <= 2.8e-3
    assert (error / exact_hidden.grad.norm(dim=1)).max() <= 5e-3
    if kind == "collapsed":
        # Liger#1329: 1 - p in low precision cancels the gradient of sure tokens away.
        assert exact.abs().min() < 1e-7, "the case must hold tokens with p > 1 - 1e-7"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_a_low_precision_head_survive_small_coefficients(kernel, dtype):
    """Coefficients of 1e-6 a token times probabilities of 1e-3 are 0 in float16."""
    hidden, weight, bias, targets = make(dtype=dtype, device=kernel.device)
    exact = [x.double().requires_grad_() for x in (weight, bias)]
    weight.requires_grad_()
    bias.requires_grad_()
    want = reference_linear_logprob(hidden.double(), exact[0], targets, bias=exact[1])[0]
    (want.sum() * 1e-6).backward()
    with vocab_pass.probabilities_as(dtype):
        got = linear_logprob(hidden, weight, targets, bias=bias, backend=kernel.backend).logp
        # Gradients of 1e-6 are subnormal in float16: the last step scales them as a scaler would.
        ours = torch.autograd.grad(got.sum() * 1e-6, (weight, bias), retain_graph=True)
    floor = 6e-8 if dtype == torch.float16 else 0.0
    for a, x in zip(ours, exact, strict=True):
        assert (a - x.grad).norm() <= 6e-3 * x.grad.norm() + floor * x.numel() ** 0.5


def test_a_low_precision_head_sums_what_its_logits_could_not_hold(kernel):
    """Gradients of 1e-4 of the head, from gradients of 1e-8 of the logits: 0 in float16."""
    if interpreted():
        pytest.skip("the interpreter truncates where a GPU rounds")
    hidden, weight, _, targets = make(N=40, device=kernel.device)
    hidden, weight = (hidden * 1024).half(), (weight / 1024).half().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    (reference_linear_logprob(hidden.double(), exact, targets)[0].sum() * 1e-6).backward()
    with vocab_pass.probabilities_as(torch.float16):
        (
            linear_logprob(hidden, weight, targets, backend=kernel.backend).logp.sum() * 1e-6
        ).backward()
    assert (weight.grad - exact.grad).norm() <= 1e-3 * exact.grad.norm()


def test_float32_error_stays_under_1e_5(kernel):
    hidden, weight, bias, targets = make(
        N=8 if interpreted() else 24, H=32, V=200, device=kernel.device
    )
    hidden.requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = reference_linear_logprob(exact_hidden, weight.double(), targets, bias=bias.double())[0]
    ours = linear_logprob(hidden, weight, targets, bias=bias, backend=kernel.backend).logp
    exact.sum().backward()
    ours.sum().backward()
    assert (ours - exact).abs().max() <= 1e-5
    assert (hidden.grad - exact_hidden.grad).norm() / exact_hidden.grad.norm() <= 1e-5


def test_the_pass_without_gradients_gives_the_same_bits(kernel):
    hidden, weight, _, targets = make(device=kernel.device, N=12, V=50)
    with torch.no_grad():
        silent = linear_logprob(
            hidden, weight, targets, return_entropy=True, backend=kernel.backend
        )
    hidden.requires_grad_()
    loud = linear_logprob(hidden, weight, targets, return_entropy=True, backend=kernel.backend)
    assert torch.equal(silent.logp, loud.logp)
    assert torch.equal(silent.entropy, loud.entropy)


def test_it_is_deterministic(kernel):
    hidden, weight, _, targets = make(device=kernel.device, N=12, V=50)
    hidden.requires_grad_()
    runs = [
        torch.autograd.grad(
            linear_logprob(hidden, weight, targets, backend=kernel.backend).logp.sum(), hidden
        )[0]
        for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("shift", [-1e4, 1e3])
def test_logits_far_from_zero_cost_nothing(kernel, shift):
    """verl#2899 and SkyRL#2141: a maximum that starts at 0, or phantom columns, show up here."""
    dtype, _ = exact_dtype(kernel)
    # In float32 the shift itself rounds the logits: the logits of this case are whole numbers.
    hidden, weight, _, targets = make(dtype=dtype, device=kernel.device)
    hidden, weight = hidden.round(), weight.round()
    bias = torch.full((len(weight),), shift, dtype=dtype, device=kernel.device)
    got = linear_logprob(hidden, weight, targets, bias=bias, backend=kernel.backend).logp
    want = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    torch.testing.assert_close(got, want, atol=2e-6 if dtype == torch.float32 else 1e-9, rtol=0)


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 48, 49])
def test_a_vocabulary_that_fills_no_tile_has_no_phantom_columns(kernel, V):
    """verl#2899: V not a multiple of the tile added exp(0) per missing column."""
    hidden, weight, _, targets = make(V=V, device=kernel.device)
    bias = torch.full((V,), -50.0, device=kernel.device)  # exp(0) would drown these
    got = linear_logprob(hidden, weight, targets, bias=bias, backend=kernel.backend).logp
    want, _ = reference_linear_logprob(
        hidden.double(), weight.double(), targets, bias=bias.double()
    )
    torch.testing.assert_close(got.double(), want, atol=3e-5, rtol=0)


def test_columns_switched_off_by_a_bias_of_minus_infinity(kernel):
    hidden, weight, bias, targets = make(device=kernel.device)
    off = torch.ones(len(weight), dtype=torch.bool, device=kernel.device)
    off[targets] = False
    off[:20] &= torch.arange(20, device=kernel.device) % 2 == 0
    hidden.requires_grad_()
    out = linear_logprob(
        hidden,
        weight,
        targets,
        bias=bias.masked_fill(off, -torch.inf),
        return_entropy=True,
        backend=kernel.backend,
    )
    (grad,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), hidden)
    left = (~off).nonzero().flatten()
    place = torch.full((len(weight),), -1, device=kernel.device)
    place[left] = torch.arange(len(left), device=kernel.device)
    exact_hidden = hidden.detach().double().requires_grad_()
    want = reference_linear_logprob(
        exact_hidden, weight[left].double(), place[targets], bias=bias[left].double()
    )
    (want_grad,) = torch.autograd.grad(want[0].sum() + want[1].sum(), exact_hidden)
    close(out.logp, want[0], 1e-5)
    close(out.entropy, want[1], 1e-5)
    close(grad, want_grad, 1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_shows_and_spoils_no_other(kernel, poison):
    hidden, weight, _, targets = make(device=kernel.device)
    clean = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    hidden[4, 2] = poison
    got = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    assert not got[4].isfinite()
    keep = torch.arange(len(targets), device=kernel.device) != 4
    assert torch.equal(got[keep], clean[keep])


def test_offsets_past_two_to_the_31_elements(kernel):
    """TRL#7266, fla#1080: a row offset that overflows int32 reads another row, or crashes."""
    if kernel.device.type == "cuda":
        pytest.skip("takes 5 GB of address space that is not touched: a CPU's trick")
    V, H, stride = 10, 4, 2**28
    huge = torch.UntypedStorage(((V - 1) * stride + H) * 2)  # virtual memory, never touched
    weight = torch.tensor([], dtype=torch.float16).set_(huge, 0, (V, H), (stride, 1))
    hidden, small, _, _ = make(N=5, H=H, V=V, dtype=torch.float16)
    weight.copy_(small)
    targets = torch.tensor([9, 8, 7, 1, 0])
    hidden.requires_grad_()
    grads = []
    for w in (weight, small):
        out = linear_logprob(hidden, w, targets, backend=kernel.backend).logp
        grads.append((out, *torch.autograd.grad(out.sum(), hidden)))
    for far, near in zip(*grads, strict=True):
        assert torch.equal(far, near)


def test_more_rows_than_a_grid_has_in_its_second_dimension(kernel):
    """Liger#1294: a grid of (B, L) fails where L >= 65,536; rows here are the first dimension."""
    if interpreted():
        pytest.skip("too many programs for the interpreter; the kernels' grids are 1-D")
    N = 65_600
    hidden, weight, _, targets = make(N=N, H=2, V=3, device=kernel.device)
    with pytest.MonkeyPatch.context() as patch:
        large = Tiling(rows=N, columns=16, head_columns=16, stored_rows=N)
        patch.setattr(vocab_pass, "tiling", lambda *shape: large)
        got = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    want, _ = reference_linear_logprob(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


def test_rows_do_not_depend_on_how_many_there_are(kernel):
    hidden, weight, _, targets = make(N=12, V=50, device=kernel.device)
    full = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    part = linear_logprob(hidden[:7], weight, targets[:7], backend=kernel.backend).logp
    torch.testing.assert_close(full[:7], part, atol=2e-6, rtol=0)


def test_transposed_weight_and_strided_hidden(kernel):
    hidden, weight, _, targets = make(device=kernel.device)
    want = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    strided = torch.stack([hidden, hidden], 1)[:, 0]
    got = linear_logprob(strided, weight.T.contiguous().T, targets, backend=kernel.backend).logp
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_leading_dimensions_are_kept(kernel):
    hidden, weight, _, targets = make(device=kernel.device, N=12)
    out = linear_logprob(
        hidden.view(3, 4, -1),
        weight,
        targets.view(3, 4),
        return_entropy=True,
        backend=kernel.backend,
    )
    assert out.logp.shape == out.entropy.shape == (3, 4)
    assert torch.equal(
        out.logp.view(-1), linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    )


def test_zero_rows_and_all_masked_stay_connected_to_the_graph(kernel):
    hidden, weight, _, targets = make(device=kernel.device, N=3)
    hidden.requires_grad_()
    out = linear_logprob(
        hidden, weight, targets, mask=torch.zeros_like(targets).bool(), backend=kernel.backend
    )
    out.logp.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert linear_logprob(hidden[:0], weight, targets[:0], backend=kernel.backend).logp.shape == (
        0,
    )


def test_entropy_is_none_unless_asked_and_detached_on_request(kernel):
    hidden, weight, _, targets = make(device=kernel.device)
    hidden.requires_grad_()
    assert linear_logprob(hidden, weight, targets, backend=kernel.backend).entropy is None
    assert linear_logprob(
        hidden, weight, targets, return_entropy=True, backend=kernel.backend
    ).entropy.requires_grad
    assert not linear_logprob(
        hidden, weight, targets, return_entropy="detached", backend=kernel.backend
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


def test_a_second_derivative_is_refused(kernel):
    hidden, weight, _, targets = make(device=kernel.device, N=2)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_logprob(hidden, weight, targets, backend=kernel.backend).logp.square().sum(),
        hidden,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="has no second derivative"):
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


@pytest.mark.skipif(interpreted(), reason="the interpreter is there")
def test_triton_by_name_is_an_error_where_it_cannot_run():
    hidden, weight, _, targets = make()
    with pytest.raises(RuntimeError, match="only under TRITON_INTERPRET=1"):
        linear_logprob(hidden, weight, targets, backend="triton")


def test_float64_goes_to_torch_and_triton_by_name_refuses_it(kernel):
    hidden, weight, _, targets = make(dtype=torch.float64, device=kernel.device)
    assert linear_logprob(hidden, weight, targets).logp.dtype == torch.float64
    with pytest.raises(RuntimeError, match="compute in float32"):
        linear_logprob(hidden, weight, targets, backend="triton")


def test_any_strides_of_targets_bias_and_hidden(kernel):
    """A kernel that takes strides for granted reads other numbers, or writes its gradient askew."""
    hidden, weight, bias, targets = make(device=kernel.device)
    N = len(hidden)
    c = torch.randn(N).to(kernel.device)

    def run(h, w, t, b):
        h = h.detach().requires_grad_()
        out = linear_logprob(h, w, t, bias=b, return_entropy=True, backend=kernel.backend)
        return (*out, *torch.autograd.grad((out.logp * c).sum() + out.entropy.sum(), h))

    want = run(hidden, weight, targets, bias)
    strided_targets = torch.stack([targets, targets + 10**6], 1).flatten()[::2]
    strided_bias = torch.stack([bias, bias + 7], 1).flatten()[::2]
    for got in (
        run(hidden, weight, strided_targets, bias),
        run(hidden, weight, targets, strided_bias),
        run(hidden.T.contiguous().T, weight, targets, bias),
    ):
        for a, b in zip(got, want, strict=True):
            close(a, b, 2e-6)
    expanded = targets[:1].expand(N)
    for a, b in zip(
        run(hidden, weight, expanded, bias),
        run(hidden, weight, expanded.contiguous(), bias),
        strict=True,
    ):
        close(a, b, 2e-6)


def test_a_sure_token_keeps_its_gradient_in_float16(kernel):
    """1 - p is 1e-7 there: a gradient of that size is nothing in float16 until it is scaled."""
    unit = torch.nn.functional.normalize(torch.randn(40, 16), dim=1)
    weight = unit.to(kernel.device, torch.float16)
    targets = torch.arange(8, device=kernel.device)
    level = torch.linspace(16, 26, 8)[:, None]
    hidden = (unit[:8] * level).to(kernel.device, torch.float16)
    exact = hidden.double().requires_grad_()
    want = reference_linear_logprob(exact, weight.double(), targets)[0]
    (want.sum() * 2.0**22).backward()
    assert 0 < -want.max() < 1e-6
    hidden.requires_grad_()
    got = linear_logprob(hidden, weight, targets, backend=kernel.backend).logp
    (got.sum() * 2.0**22).backward()
    error = (hidden.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.max() <= 2e-3


def test_a_target_that_is_switched_off_spoils_no_entropy(kernel):
    hidden, weight, bias, targets = make(device=kernel.device)
    off = bias.clone()
    off[targets[2]] = -torch.inf
    hidden.requires_grad_()
    out = linear_logprob(
        hidden, weight, targets, bias=off, return_entropy=True, backend=kernel.backend
    )
    assert out.logp[2] == -torch.inf and out.entropy.isfinite().all()
    (grad,) = torch.autograd.grad(out.entropy.sum(), hidden)
    assert grad.isfinite().all()
