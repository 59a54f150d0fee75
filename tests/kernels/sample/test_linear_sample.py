"""linear_sample against float64 with the logits materialised, and what a draw may depend on."""

from __future__ import annotations

import math

import pytest
import torch

from fusedgrpo.kernels import linear_logprob, linear_sample
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.launch import Tiling
from fusedgrpo.kernels.logprob import vocab_pass
from fusedgrpo.kernels.reference import reference_linear_logprob, reference_linear_sample

ROWS = 5 if interpreted() else 13
OPTIONS = [
    {},
    {"temperature": 0.3},
    {"logit_scale": 0.25, "temperature": 1.3},
    {"softcap": 5.0},
    {"softcap": 5.0, "temperature": 0.7, "logit_scale": 2.0},
]


def tiles_of(columns, rows=5):
    return Tiling(rows=rows, columns=columns, head_columns=12, stored_rows=5)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks of rows and several tiles of the vocabulary, the last one ragged."""
    monkeypatch.setattr(vocab_pass, "tiling", lambda *shape: tiles_of(16))


def make(kernel, M=ROWS, H=8, V=53, dtype=torch.float32, seed=0, whole=False):
    """hidden, weight, bias, and keywords with seeds and positions. ``whole``: exact logits, whole
    numbers however a GEMM adds them up."""
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*shape, generator=g) for shape in ((M, H), (V, H), (V,))]
    if whole:
        tensors = [(2 * x).round() / 2 for x in tensors]
    seeds = torch.randint(-(2**63), 2**63 - 1, (M,), generator=g)
    positions = torch.randint(0, 2**34, (M,), generator=g)
    draw = {"seeds": seeds.to(kernel.device), "positions": positions.to(kernel.device)}
    hidden, weight, bias = (x.to(kernel.device, dtype) for x in tensors)
    return hidden, weight, bias, draw


def sure(scores):
    """Rows whose two best scores differ by more than rounding."""
    first, second = scores.topk(2).values.unbind(1)
    return first - second > 1e-4


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_tokens_and_log_probs_equal_the_reference(kernel, options, with_bias, greedy):
    hidden, weight, bias, draw = make(kernel)
    options = {**options, "greedy": greedy}
    got = linear_sample(
        hidden,
        weight,
        **draw,
        bias=bias if with_bias else None,
        backend=kernel.backend,
        **options,
    )
    token, logp, scores = reference_linear_sample(
        hidden.double(), weight.double(), **draw, bias=bias.double() if with_bias else None,
        **options,
    )  # fmt: skip
    assert got.token.dtype == torch.int64 and got.logp.dtype == torch.float32
    assert sure(scores).all(), "another seed, please"
    assert torch.equal(got.token, token)
    assert (got.logp - logp).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_meet_the_same_bar(kernel, dtype):
    if kernel.backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton kernels compute in float32")
    hidden, weight, bias, draw = make(kernel, H=64, V=101, dtype=dtype)
    got = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend)
    exact = (hidden.double(), weight.double())
    _, _, scores = reference_linear_sample(*exact, **draw, bias=bias.double())
    logp, _ = reference_linear_logprob(*exact, got.token, bias=bias.double())
    chosen = scores.gather(1, got.token[:, None])[:, 0]
    assert (scores.amax(1) - chosen).max() <= 1e-4
    assert (got.logp - logp).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_log_prob_is_that_of_linear_logprob_bit_for_bit(kernel, options):
    """Whichever tile the token was in, and however often the best changed before and after."""
    hidden, weight, bias, draw = make(kernel, M=8, seed=4)
    hidden, bias = hidden * 0.1, bias * 0.1
    got = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend, **options)
    assert len((got.token // 16).unique()) == 4, "tokens of every tile"
    want = linear_logprob(
        hidden, weight, got.token, bias=bias, backend=kernel.backend, **options
    ).logp
    assert torch.equal(got.logp, want)


@pytest.mark.parametrize("columns", [1, 3, 7, 12, 16, 52, 53, 64])
def test_a_draw_does_not_depend_on_the_tiling(kernel, columns, monkeypatch):
    if interpreted() and columns < 7:
        pytest.skip("many programs, and nothing that 7 columns do not have")
    hidden, weight, bias, draw = make(kernel, whole=True)
    want = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend)
    monkeypatch.setattr(vocab_pass, "tiling", lambda *shape: tiles_of(columns, rows=3))
    got = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend)
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.logp, want.logp, atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", OPTIONS[:4:3])
def test_a_row_alone_says_the_same_bit_for_bit_where_its_logits_are_the_same(kernel, options):
    hidden, weight, bias, draw = make(kernel, whole=True)
    options = {**options, "bias": bias, "backend": kernel.backend}
    whole = linear_sample(hidden, weight, **draw, **options)
    order = torch.randperm(len(hidden)).to(kernel.device)
    turned = linear_sample(
        hidden[order], weight, draw["seeds"][order], draw["positions"][order], **options
    )
    assert torch.equal(turned.token, whole.token[order])
    assert torch.equal(turned.logp, whole.logp[order])
    for row in range(len(hidden)):
        rows = slice(row, row + 1)
        alone = linear_sample(
            hidden[rows], weight, draw["seeds"][rows], draw["positions"][rows], **options
        )
        assert torch.equal(alone.token, whole.token[rows])
        assert torch.equal(alone.logp, whole.logp[rows])


def test_a_row_alone_says_the_same_within_the_rounding_of_the_gemm(kernel):
    hidden, weight, bias, draw = make(kernel, M=6, H=40, V=101)
    whole = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend)
    for row in range(len(hidden)):
        rows = slice(row, row + 1)
        seeds, positions = draw["seeds"][rows], draw["positions"][rows]
        alone = linear_sample(
            hidden[rows], weight, seeds, positions, bias=bias, backend=kernel.backend
        )
        assert torch.equal(alone.token, whole.token[rows])
        torch.testing.assert_close(alone.logp, whole.logp[rows], atol=5e-6, rtol=0)


def test_all_bits_of_seed_and_position_count(kernel, monkeypatch):
    monkeypatch.setattr(vocab_pass, "tiling", lambda *shape: tiles_of(512, rows=7))
    hidden, weight, _, _ = make(kernel, M=1, V=1000)
    seeds = torch.tensor([5, 6, 5 + 2**32, 5 - 2**63, 5, 5, 5], device=kernel.device)
    positions = torch.tensor([9, 9, 9, 9, 10, 9 + 2**32, 9 + 2**62], device=kernel.device)
    rows = hidden.mul(0.1).expand(len(seeds), -1)
    token = linear_sample(rows, weight, seeds, positions, backend=kernel.backend).token
    assert len(token.unique()) == len(token)


def chi_square(counts, p):
    """How far counts are from what they should be, in standard deviations of the statistic."""
    expected = p * counts.sum()
    order = expected.argsort()
    counts, expected = counts[order].double(), expected[order]
    rare = int((expected.cumsum(0) < 20).sum()) + 1  # pooled
    counts = torch.cat([counts[:rare].sum()[None], counts[rare:]])
    expected = torch.cat([expected[:rare].sum()[None], expected[rare:]])
    statistic = ((counts - expected).square() / expected).sum().item()
    return (statistic - (len(counts) - 1)) / math.sqrt(2 * (len(counts) - 1))


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_20000_draws_have_the_frequencies_of_the_softmax(kernel, temperature, varied, monkeypatch):
    if interpreted():
        pytest.skip("too many programs for the interpreter; its tokens are compared one by one")
    monkeypatch.setattr(vocab_pass, "tiling", lambda *shape: tiles_of(16, rows=20_000))
    hidden, weight, _, _ = make(kernel, M=1, V=50)
    hidden = hidden.mul(0.5).expand(20_000, -1)
    counter = torch.arange(20_000, device=kernel.device)
    draw = {"seeds": torch.full_like(counter, 11), "positions": torch.full_like(counter, 4)}
    draw[varied] = counter
    token = linear_sample(
        hidden, weight, **draw, temperature=temperature, backend=kernel.backend
    ).token
    p = (hidden[:1].double() @ weight.double().T / temperature).softmax(1)[0]
    assert abs(chi_square(token.bincount(minlength=50), p)) < 4
    # The softmax at another temperature is another one, and this test knows.
    other = (hidden[:1].double() @ weight.double().T / temperature / 1.1).softmax(1)[0]
    assert chi_square(token.bincount(minlength=50), other) > 8
    pairs = (token[1:] == token[:-1]).double().mean()
    same = p.square().sum()
    assert abs(pairs - same) < 4 * (same / 20_000).sqrt()


@pytest.mark.parametrize("V", [1, 2, 3, 15, 16, 17, 48, 49])
def test_a_vocabulary_that_fills_no_tile_has_no_phantom_tokens(kernel, V):
    hidden, weight, _, draw = make(kernel, V=V)
    bias = torch.full((V,), -50.0, device=kernel.device)
    got = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend)
    exact = (hidden.double(), weight.double())
    token, logp, _ = reference_linear_sample(*exact, **draw, bias=bias.double())
    assert torch.equal(got.token, token)
    torch.testing.assert_close(got.logp.double(), logp, atol=3e-5, rtol=0)
    if V == 1:
        assert torch.equal(got.logp, torch.zeros_like(got.logp))


def test_tokens_switched_off_by_a_bias_of_minus_infinity_are_never_drawn(kernel):
    hidden, weight, bias, draw = make(kernel)
    off = torch.ones(len(weight), dtype=torch.bool, device=kernel.device)
    left = torch.tensor([18, 21, 40], device=kernel.device)  # none in the first and the last tile
    off[left] = False
    switched = bias.masked_fill(off, -torch.inf)
    got = linear_sample(hidden, weight, **draw, bias=switched, backend=kernel.backend)
    assert torch.isin(got.token, left).all()
    logp, _ = reference_linear_logprob(
        hidden.double(), weight.double(), got.token, bias=switched.double()
    )
    assert (got.logp - logp).abs().max() <= 1e-5


def test_of_equal_logits_greedy_takes_the_lowest_id(kernel):
    hidden, weight, bias, draw = make(kernel)
    same = bias * 0
    greedy = {"greedy": True, "backend": kernel.backend}
    flat = linear_sample(hidden * 0, weight, **draw, bias=same, **greedy)
    assert torch.equal(flat.token, torch.zeros_like(flat.token))
    torch.testing.assert_close(flat.logp, torch.full_like(flat.logp, -math.log(53)))
    for tied in ([20, 21, 35], [5, 17], [47, 48]):  # in one tile and in several
        raised = same.clone()
        raised[tied] = 3.0
        got = linear_sample(hidden * 0, weight, **draw, bias=raised, **greedy)
        assert torch.equal(got.token, torch.full_like(got.token, tied[0]))


def test_equal_logits_are_drawn_by_their_noise(kernel):
    hidden, weight, _, draw = make(kernel)
    got = linear_sample(hidden * 0, weight, **draw, backend=kernel.backend)
    token, _, _ = reference_linear_sample(hidden.double() * 0, weight.double(), **draw)
    assert torch.equal(got.token, token) and len(token.unique()) > 3
    torch.testing.assert_close(got.logp, torch.full_like(got.logp, -math.log(53)))


@pytest.mark.parametrize("shift", [-1e4, 1e3])
def test_logits_far_from_zero_cost_nothing(kernel, shift):
    hidden, weight, _, draw = make(kernel, whole=True)
    bias = torch.full((len(weight),), shift, device=kernel.device)
    options = {"backend": kernel.backend, "greedy": True}  # a score far from 0 has little noise
    got = linear_sample(hidden, weight, **draw, bias=bias, **options)
    want = linear_sample(hidden, weight, **draw, **options)
    assert torch.equal(got.token, want.token)
    torch.testing.assert_close(got.logp, want.logp, atol=2e-6, rtol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("greedy", [False, True])
def test_a_row_that_is_not_finite_shows_and_spoils_no_other(kernel, poison, greedy):
    hidden, weight, _, draw = make(kernel)
    options = {"backend": kernel.backend, "greedy": greedy}
    clean = linear_sample(hidden, weight, **draw, **options)
    hidden[4, 2] = poison
    got = linear_sample(hidden, weight, **draw, **options)
    assert got.logp[4].isnan() and 0 <= got.token[4] < len(weight)
    keep = torch.arange(len(hidden), device=kernel.device) != 4
    assert torch.equal(got.logp[keep], clean.logp[keep])
    assert torch.equal(got.token[keep], clean.token[keep])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 20, 52])
def test_one_logit_that_is_not_finite_is_enough(kernel, bad, at):
    hidden, weight, bias, draw = make(kernel)
    bias[at] = bad
    got = linear_sample(hidden, weight, **draw, bias=bias, backend=kernel.backend)
    assert got.logp.isnan().all()
    assert ((got.token >= 0) & (got.token < 53)).all()


def test_a_row_with_nothing_to_draw_shows(kernel):
    hidden, weight, bias, draw = make(kernel)
    off = torch.full_like(bias, -torch.inf)
    got = linear_sample(hidden, weight, **draw, bias=off, backend=kernel.backend)
    assert got.logp.isnan().all() and torch.equal(got.token, torch.zeros_like(got.token))
