"""rms_norm against float64, and against the modules of transformers that it stands in for."""

from __future__ import annotations

import pytest
import torch

from fusedgrpo.kernels import rms_norm
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.reference import reference_rms_norm

LOW = [torch.bfloat16, torch.float16]


def data(kernel, dtype, *shape):
    x = (torch.randn(*shape) + 0.3) * torch.logspace(-2, 2, shape[0]).view(
        -1, *[1] * len(shape[1:])
    )
    weight = 1 + 0.5 * torch.randn(shape[-1])
    return x.to(kernel.device, dtype), weight.to(kernel.device, dtype)


@pytest.mark.parametrize("rounds_first,offset", [(True, 0.0), (False, 0.0), (False, 1.0)])
@pytest.mark.parametrize("H", [1, 7, 64, 3584])
def test_it_equals_the_reference(kernel, H, rounds_first, offset):
    x, weight = data(kernel, torch.float32, 5, H)
    options = {"rounds_first": rounds_first, "offset": offset}
    got = rms_norm(x, weight, 1e-3, backend=kernel.backend, **options)
    assert got.dtype == x.dtype and got.is_contiguous()
    want = reference_rms_norm(x, weight, 1e-3, offset=offset)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rounds_first", [True, False])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_in_16_bits_it_is_rounded_where_it_says(kernel, dtype, rounds_first):
    x, weight = data(kernel, dtype, 6, 3, 96)
    got = rms_norm(x, weight, 1e-5, rounds_first=rounds_first, backend=kernel.backend)
    y = reference_rms_norm(x, torch.ones_like(weight), 1e-5)
    want = y.to(dtype).double() * weight.double() if rounds_first else y * weight.double()
    assert got.shape == x.shape and got.dtype == dtype
    if interpreted() and dtype == torch.bfloat16:  # it cuts where others round
        torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        return
    # The float32 y is at the border of two numbers in 16 bits here and there.
    assert (got != want.to(dtype)).double().mean() < 0.01
    torch.testing.assert_close(got.double(), want, rtol=1.01 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_weight_of_another_dtype_gives_what_torch_multiplies(kernel):
    x, weight = data(kernel, torch.bfloat16, 4, 32)
    got = rms_norm(x, weight.float(), 1e-5, backend=kernel.backend)
    assert got.dtype == torch.float32
    once = rms_norm(x, weight.float(), 1e-5, rounds_first=False, backend=kernel.backend)
    assert once.dtype == torch.bfloat16


def test_rows_may_be_apart_and_dimensions_too(kernel):
    x, weight = data(kernel, torch.float32, 6, 40)
    want = rms_norm(x[:, :20].contiguous(), weight[:20], 1e-5, backend=kernel.backend)
    for same in (x[:, :20], x[:, :20].T.contiguous().T):
        got = rms_norm(same, weight[:20], 1e-5, backend=kernel.backend)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_a_row_is_the_same_in_any_company(kernel):
    x, weight = data(kernel, torch.float32, 9, 200)
    whole = rms_norm(x, weight, 1e-5, backend=kernel.backend)
    alone = [rms_norm(row[None], weight, 1e-5, backend=kernel.backend) for row in x]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-6, atol=1e-7)
    if kernel.backend == "triton":
        assert torch.equal(torch.cat(alone), whole)


def test_no_rows(kernel):
    x, weight = data(kernel, torch.float32, 3, 8)
    assert rms_norm(x[:0], weight, 1e-5, backend=kernel.backend).shape == (0, 8)


def test_what_does_not_fit_is_refused():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"\(3, 8\) and weight \(7,\): expected"):
        rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(TypeError, match="expected floating"):
        rms_norm(x.int(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"offset=1.0 with rounds_first"):
        rms_norm(x, weight, 1e-5, offset=1.0)
    with pytest.raises(RuntimeError, match="no gradient"):
        rms_norm(x.requires_grad_(), weight, 1e-5)
