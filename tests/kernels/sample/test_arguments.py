"""linear_sample: shapes, strides, dtypes and options that it takes and refuses."""

from __future__ import annotations

import pytest
import torch

from fusedgrpo.kernels import linear_sample
from fusedgrpo.kernels.backend import interpreted

M, H, V = 5, 6, 31


def make(device="cpu"):
    hidden, weight, bias = (torch.randn(*s).to(device) for s in ((M, H), (V, H), (V,)))
    return hidden, weight, torch.arange(M, device=device), torch.arange(M, device=device) + 3, bias


def test_no_rows_give_no_tokens(kernel):
    hidden, weight, seeds, positions, _ = make(kernel.device)
    got = linear_sample(hidden[:0], weight, seeds[:0], positions[:0], backend=kernel.backend)
    assert got.token.shape == got.logp.shape == (0,)
    assert got.token.dtype == torch.int64 and got.logp.dtype == torch.float32


def test_any_strides(kernel):
    hidden, weight, seeds, positions, bias = make(kernel.device)
    want = linear_sample(hidden, weight, seeds, positions, bias=bias, backend=kernel.backend)
    spread = [torch.stack([x, x + 9], 1).flatten(0, 1)[::2] for x in (seeds, positions, bias)]
    got = linear_sample(
        hidden.T.contiguous().T,
        weight.T.contiguous().T,
        spread[0],
        spread[1],
        bias=spread[2],
        backend=kernel.backend,
    )
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.logp, want.logp, rtol=0, atol=2e-6)


def test_greedy_reads_neither_seed_nor_position(kernel):
    hidden, weight, seeds, positions, _ = make(kernel.device)
    options = {"greedy": True, "backend": kernel.backend}
    a = linear_sample(hidden, weight, seeds, positions, **options)
    b = linear_sample(hidden, weight, seeds + 1, positions - 7, **options)
    assert torch.equal(a.token, b.token) and torch.equal(a.logp, b.logp)
    assert torch.equal(a.token, (hidden @ weight.T).argmax(1))


def test_a_draw_carries_no_gradient(kernel):
    hidden, weight, seeds, positions, bias = make(kernel.device)
    for x in (hidden, weight, bias):
        x.requires_grad_()
    got = linear_sample(hidden, weight, seeds, positions, bias=bias, backend=kernel.backend)
    assert not got.logp.requires_grad and not got.token.requires_grad


def test_under_autocast_both_operands_are_cast():
    hidden, weight, seeds, positions, _ = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_sample(hidden, weight, seeds, positions)
    want = linear_sample(hidden.bfloat16(), weight.bfloat16(), seeds, positions)
    assert torch.equal(got.token, want.token) and torch.equal(got.logp, want.logp)
    assert got.logp.dtype == torch.float32


def test_bad_shapes_and_dtypes_are_named():
    hidden, weight, seeds, positions, bias = make()
    with pytest.raises(ValueError, match=r"expected \[M, H\] and \[V, H\] with V > 0"):
        linear_sample(hidden[0], weight, seeds[0], positions[0])
    with pytest.raises(ValueError, match=r"expected \[M, H\] and \[V, H\] with V > 0"):
        linear_sample(hidden, weight[:0], seeds, positions)
    with pytest.raises(ValueError, match="hidden has shape"):
        linear_sample(hidden[:, 1:], weight, seeds, positions)
    with pytest.raises(ValueError, match="seeds has shape"):
        linear_sample(hidden, weight, seeds[1:], positions)
    with pytest.raises(ValueError, match=r"positions has shape .* expected \(5,\) and torch.int64"):
        linear_sample(hidden, weight, seeds, positions.int())
    with pytest.raises(ValueError, match="bias has shape"):
        linear_sample(hidden, weight, seeds, positions, bias=bias[1:])
    with pytest.raises(TypeError, match="one floating dtype"):
        linear_sample(hidden.bfloat16(), weight, seeds, positions)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_options_are_named(change, message):
    hidden, weight, seeds, positions, _ = make()
    with pytest.raises(ValueError, match=message):
        linear_sample(hidden, weight, seeds, positions, **change)


@pytest.mark.skipif(interpreted(), reason="the interpreter is there")
def test_triton_by_name_is_an_error_where_it_cannot_run():
    hidden, weight, seeds, positions, _ = make()
    with pytest.raises(RuntimeError, match=r"for linear_sample on cpu: .*TRITON_INTERPRET=1"):
        linear_sample(hidden, weight, seeds, positions, backend="triton")
