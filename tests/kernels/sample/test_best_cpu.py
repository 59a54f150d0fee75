"""The CPU's way to the best token: what scoring every token gives, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fusedgrpo.kernels.logprob.tiles import HeadOptions
from fusedgrpo.kernels.sample import best, best_cpu, philox_numpy
from fusedgrpo.kernels.sample.best import RunningBest
from fusedgrpo.kernels.sample.noise import Noise
from fusedgrpo.kernels.sample.philox import PURPOSE, WORD, gumbel, gumbel_tile, philox4x32

R = 9
INF = torch.inf


def logits(kind, V, dtype, g):
    """``[R, V]``: flat, peaked, huge, and rows in which something is not finite."""
    z = torch.randn(R, V, generator=g, dtype=torch.float64)
    if kind == "peaked":
        z = z * 12
    elif kind == "flat":
        z = z * 0.01
    elif kind == "equal":
        z = torch.full_like(z, 7.25)
    elif kind == "coarse":  # many of one value
        z = z.round() * 2
    elif kind.startswith("far"):
        z = z * 5 + float(kind[3:])
    elif kind.startswith("spread"):
        z = z * float(kind[6:])
    elif kind == "rising":  # the best changes in every tile
        z = z + torch.arange(V) * 0.3
    elif kind == "filtered":
        z = z.masked_fill(torch.rand(R, V, generator=g) < 0.95, -INF)
        z[0] = -INF
    elif kind == "broken":
        for row, bad in enumerate((torch.nan, INF, -INF, torch.nan, INF)):
            z[row, torch.rand(V, generator=g) < 0.1] = bad
        z[3:5, 0] = torch.nan
        z[4] = INF
    return z.to(dtype)


KINDS = ["plain", "peaked", "flat", "equal", "coarse", "rising", "filtered", "broken"]
KINDS += ["far1e4", "far-1e4", "far3e7", "far-1e9", "far1e12"]
KINDS += ["spread1e3", "spread1e7", "spread1e12", "spread1e30"]


def over_the_tiles(module, z, columns, head, bias, noise):
    running = RunningBest.start(len(z), z, z.dtype)
    for lo in range(0, z.shape[1], columns):
        # A slice of a wider buffer, as the last tile is.
        tile = torch.empty(len(z), columns + 3, dtype=z.dtype)[
            :, : z[:, lo : lo + columns].shape[1]
        ]
        tile.copy_(z[:, lo : lo + columns])
        tile_bias = None if bias is None else bias[lo : lo + columns]
        module.sample_tile(tile, tile_bias, lo, head, noise, running)
    return running


def assert_same(got, want):
    for name in ("token", "score", "column"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("others", "every"):
        for field in ("high", "total", "z_target"):
            a, b = (getattr(getattr(x, name), field) for x in (got, want))
            assert torch.equal(a.nan_to_num(-1.5), b.nan_to_num(-1.5)), (name, field)


# Every kind with and without noise, half of them in each type each time.
@pytest.mark.parametrize(
    ("kind", "greedy", "dtype"),
    [
        (kind, greedy, (torch.float32, torch.float64)[(i + greedy) % 2])
        for i, kind in enumerate(KINDS)
        for greedy in (False, True)
    ],
)
def test_tokens_and_sums_are_those_of_scoring_every_token(kind, greedy, dtype):
    g = torch.Generator().manual_seed(KINDS.index(kind))
    for V, columns in ((1, 1), (3, 8), (61, 7), (300, 64), (1003, 130), (3000, 1000), (700, 3)):
        z = logits(kind, V, dtype, g)
        seeds = torch.randint(-(2**63), 2**63 - 1, (R,), generator=g)
        positions = torch.randint(0, 2**34, (R,), generator=g)
        noise = None if greedy else Noise(seeds, positions, V)
        options = (z, columns, HeadOptions(), None, noise)
        got, want = (over_the_tiles(x, *options) for x in (best_cpu, best))
        assert_same(got, want)
        # Whatever the tiles: the first of the greatest scores.
        score = z if greedy else gumbel_tile(seeds, positions, 0, V, dtype) + z
        score = score.masked_fill(score.isnan(), -INF)
        assert torch.equal(got.token, score.max(1).indices)


@pytest.mark.parametrize("head", [HeadOptions(0.4, 0.3), HeadOptions(0.7, 2.0, softcap=4.0)])
def test_bias_scale_and_softcap_come_first(head):
    g = torch.Generator().manual_seed(1)
    z, bias = logits("peaked", 777, torch.float32, g), torch.randn(777, generator=g)
    noise = Noise(torch.arange(R), torch.arange(R) + 2**33, 777)
    got, want = (over_the_tiles(m, z, 100, head, bias, noise) for m in (best_cpu, best))
    assert_same(got, want)
    assert not torch.equal(got.token, z.argmax(1))


def test_the_rarest_noise_wins_where_it_does(monkeypatch):
    """The extremes of the bits, which no seed shows soon: 0, and those just beyond a bound."""
    V = 4096
    g = torch.Generator().manual_seed(5)
    for shift in (0.0, 3e4, -2e6):
        # For each token the bits with which its score about equals that of the first one.
        z = (torch.rand(R, V, generator=g) * -24 + shift).float()
        z[:, 0] = shift
        first = torch.randint(0, 2**32, (R, 1), generator=g)
        exact = z.double() - z[:, :1].double() - gumbel(first, torch.float64)
        near = (-torch.expm1(-exact.exp()) * 2**32).round() + torch.randint(
            -3, 4, (R, V), generator=g
        )
        bits = near.clamp(0, WORD).long()
        bits[:, :1] = first
        bits[torch.rand(R, V, generator=g) < 0.5] = WORD
        bits[torch.rand(R, V, generator=g) < 1e-3] = 0
        noise = Noise(torch.zeros(R, dtype=torch.int64), torch.zeros(R, dtype=torch.int64), V)
        drawn = bits.numpy().astype(np.uint32)
        monkeypatch.setattr(noise, "bits", lambda lo, n, drawn=drawn: drawn[:, lo : lo + n])
        monkeypatch.setattr(
            noise, "gumbel", lambda lo, n, dtype, bits=bits: gumbel(bits[:, lo : lo + n], dtype)
        )
        for columns in (64, 4096):
            options = (z, columns, HeadOptions(), None, noise)
            got, want = (over_the_tiles(m, *options) for m in (best_cpu, best))
            assert_same(got, want)


def test_few_tokens_are_scored(monkeypatch):
    """Of 20,000 tokens a handful in each row, however they are distributed."""
    scored = []
    plain = best_cpu.gumbel
    monkeypatch.setattr(
        best_cpu, "gumbel", lambda bits, dtype: scored.append(bits.numel()) or plain(bits, dtype)
    )
    for scale in (0.0, 0.1, 3.0, 20.0):
        z = torch.randn(R, 20_000, generator=torch.Generator().manual_seed(2)) * scale
        noise = Noise(torch.arange(R), torch.arange(R), 20_000)
        over_the_tiles(best_cpu, z, 500, HeadOptions(), None, noise)
        assert R <= sum(scored) < 60 * R, scale
        scored.clear()


@pytest.mark.parametrize("first", [0, 1, 5000])
@pytest.mark.parametrize("quads", [1, 3, 700])
@pytest.mark.parametrize("rows", [1, 2, 40])
def test_the_bits_of_numpy_are_those_of_torch(rows, quads, first):
    g = torch.Generator().manual_seed(rows)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (2, rows), generator=g)
    counter = (
        torch.arange(first, first + quads)[None],
        (positions & WORD)[:, None],
        (positions >> 32 & WORD)[:, None],
        torch.full((rows, 1), PURPOSE),
    )
    want = philox4x32(counter, ((seeds & WORD)[:, None], (seeds >> 32 & WORD)[:, None]))
    got = philox_numpy.token_bits(seeds.numpy(), positions.numpy(), first, quads)
    assert got.dtype == np.uint32
    assert torch.equal(torch.from_numpy(got.astype(np.int64)), torch.stack(want, 2).flatten(1))


@pytest.mark.parametrize("together", [1, 100, 2**14])
def test_bits_that_were_looked_ahead_are_those_of_their_tokens(monkeypatch, together):
    monkeypatch.setattr(philox_numpy, "TOGETHER", together)
    seeds, positions = torch.arange(6) - 3, torch.arange(6) * 2**33
    noise = Noise(seeds, positions, 1000)
    for lo, width in ((0, 7), (7, 1), (8, 300), (308, 9), (317, 683), (2, 5), (999, 1)):
        bits = torch.from_numpy(noise.bits(lo, width).astype(np.int64))
        want = gumbel_tile(seeds, positions, lo, width, torch.float64)
        assert torch.equal(gumbel(bits, torch.float64), want)
