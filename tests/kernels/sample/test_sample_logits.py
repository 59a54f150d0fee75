"""sample_logits: linear_sample's choice, from rows of logits that may have been filtered."""

from __future__ import annotations

import pytest
import torch

from fusedgrpo.kernels import linear_sample
from fusedgrpo.kernels.sample import logits as logits_module
from fusedgrpo.kernels.sample.logits import sample_logits

M, H, V = 7, 8, 5003


def make(device, scale=1.0):
    hidden, weight = (torch.randn(n, H, device=device) * scale for n in (M, V))
    return hidden, weight, torch.arange(M, device=device) - 3, torch.arange(M, device=device) + 9


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_unfiltered_it_says_what_linear_sample_says(kernel, scale, greedy, monkeypatch):
    if kernel.backend == "triton":
        pytest.skip("plain torch everywhere")
    hidden, weight, seeds, positions = make(kernel.device, scale)
    want = linear_sample(
        hidden, weight, seeds, positions, temperature=0.7, greedy=greedy, backend="torch"
    )
    z = hidden @ weight.T / 0.7
    before = z.clone()
    for rows, columns in ((1024, 4096), (2, 10), (7, 999)):
        monkeypatch.setattr(logits_module, "ROWS", rows)
        monkeypatch.setattr(logits_module, "COLUMNS", columns)
        monkeypatch.setattr(logits_module, "CACHED", columns * M)
        got = sample_logits(z, seeds, positions, greedy=greedy)
        assert got.token.dtype == torch.int64 and got.logp.dtype == torch.float32
        assert torch.equal(got.token, want.token)
        torch.testing.assert_close(got.logp, want.logp, atol=1e-5, rtol=1e-5)
    assert torch.equal(z, before)


@pytest.mark.parametrize("left", [1, 2, 40])
def test_only_what_a_filter_left_is_drawn_and_its_probability_is_that_of_what_is_left(kernel, left):
    if kernel.backend == "triton":
        pytest.skip("plain torch everywhere")
    hidden, weight, seeds, positions = make(kernel.device)
    z = hidden @ weight.T
    least = z.topk(left).values[:, -1:]
    filtered = z.masked_fill(z < least, -torch.inf)
    got = sample_logits(filtered, seeds, positions)
    assert (z.gather(1, got.token[:, None]) >= least).all()
    want = filtered.double().log_softmax(1).gather(1, got.token[:, None])[:, 0]
    torch.testing.assert_close(got.logp.double(), want, atol=1e-5, rtol=1e-5)
    if left == 1:
        assert torch.equal(got.token, z.argmax(1)) and (got.logp == 0).all()


def test_rows_that_are_not_finite_show(kernel):
    if kernel.backend == "triton":
        pytest.skip("plain torch everywhere")
    z = torch.zeros(4, 30, device=kernel.device)
    z[0, 3], z[1, 5], z[2] = torch.nan, torch.inf, -torch.inf
    rows = torch.arange(4, device=kernel.device)
    for greedy in (False, True):
        got = sample_logits(z, rows, rows, greedy=greedy)
        assert got.logp.isnan().tolist() == [True, True, True, False]
        assert ((got.token >= 0) & (got.token < 30)).all()


def test_no_rows_give_no_tokens():
    none = torch.zeros(0, dtype=torch.int64)
    got = sample_logits(torch.zeros(0, 5), none, none)
    assert got.token.shape == got.logp.shape == (0,) and got.token.dtype == torch.int64


def test_what_does_not_fit_is_named():
    rows = torch.arange(3)
    with pytest.raises(ValueError, match=r"expected \[M, V\] with V > 0"):
        sample_logits(torch.zeros(3, 0), rows, rows)
    with pytest.raises(TypeError, match=r"bfloat16: expected torch.float32"):
        sample_logits(torch.zeros(3, 5).bfloat16(), rows, rows)
    with pytest.raises(ValueError, match="seeds has shape"):
        sample_logits(torch.zeros(3, 5), rows[1:], rows)
    with pytest.raises(ValueError, match=r"positions has .* expected \(3,\) and torch.int64"):
        sample_logits(torch.zeros(3, 5), rows, rows.int())
