"""The noise of sampling: known answers, the same bits in torch and Triton, and sound floats."""

from __future__ import annotations

import pytest
import torch

from fusedgrpo.kernels.reference import reference_philox4x32
from fusedgrpo.kernels.sample.philox import PURPOSE, WORD, gumbel, gumbel_tile, philox4x32

# Of Random123's kat_vectors: counter, key, result.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (WORD, WORD, WORD, WORD),
        (WORD, WORD),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = torch.tensor([0, 1, -1, 2**40 + 5, -(2**63), 2**63 - 1])
POSITIONS = torch.tensor([0, 7, 2**31, 2**32 + 3, 1, 2**63 - 1])


def words_of(kernel, words):
    """Philox of six words, counter and key, by the implementation under test."""
    words = torch.tensor(words, device=kernel.device)
    if kernel.backend == "triton":
        from noise_kernels import philox_words

        return philox_words(words).tolist()
    # Enough columns for vector instructions and a rest.
    counter = tuple(word.expand(1, 19) for word in words[:4])
    key = (words[4].expand(1, 1), words[5].expand(1, 1))
    found = torch.stack(philox4x32(counter, key))
    assert torch.equal(found, found[..., :1].expand_as(found))
    return found[:, 0, 0].tolist()


def reference_bits(first):
    def one(seed, position, token):
        key = (seed % 2**32, (seed >> 32) % 2**32)
        counter = (token // 4, position % 2**32, (position >> 32) % 2**32, PURPOSE)
        return reference_philox4x32(counter, key)[token % 4]

    pairs = zip(SEEDS.tolist(), POSITIONS.tolist(), strict=True)
    return torch.tensor([[one(s, p, first + t) for t in range(32)] for s, p in pairs])


@pytest.mark.parametrize("counter,key,want", KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(kernel, counter, key, want):
    assert reference_philox4x32(counter, key) == want
    assert tuple(words_of(kernel, [*counter, *key])) == want


@pytest.mark.parametrize("first", [0, 151_936])
def test_the_bits_of_a_token_are_those_of_seed_position_and_token(kernel, first):
    want = reference_bits(first)
    if kernel.backend == "triton":
        from noise_kernels import bits_of_tokens

        found = bits_of_tokens(SEEDS.to(kernel.device), POSITIONS.to(kernel.device), first)
        assert torch.equal(found.cpu(), want)
    for skip in range(5):  # a tile that begins between two fours
        noise = gumbel_tile(
            SEEDS.to(kernel.device), POSITIONS.to(kernel.device), first + skip, 7, torch.float64
        )
        # A GPU's logarithm may differ in the last bit.
        ulps = 0 if kernel.device.type == "cpu" else 1e-14
        expected = gumbel(want[:, skip : skip + 7], torch.float64)
        torch.testing.assert_close(noise.cpu(), expected, rtol=ulps, atol=ulps)


def test_no_number_is_infinite_and_all_are_accurate(kernel):
    """A large number comes from a v near 0, of which a float of 1 - v would know 24 bits."""
    ends = [0, 1, 2, 3, 100, 2**16, 2**24 - 1, 2**24 + 1, 2**31 - 1]
    bits = torch.tensor([*ends, *(WORD - end for end in ends)])
    bits = torch.cat([bits, torch.randint(0, 2**32, (64 - len(bits),))]).to(kernel.device)
    exact = -torch.log(-torch.log1p(-(bits.double() + 0.5) / 2**32))
    if kernel.backend == "triton":
        from noise_kernels import gumbel_of_bits

        found = gumbel_of_bits(bits)
    else:
        found = gumbel(bits, torch.float32)
    assert found.dtype == torch.float32
    assert found[0] == found.max() and 22.8 < found[0] < 22.9
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=3e-7)
    assert torch.isfinite(gumbel(bits, torch.float64)).all()


def test_numbers_have_the_moments_of_gumbel(kernel):
    if kernel.backend == "triton":
        pytest.skip("its bits are the same")
    positions = torch.arange(64, device=kernel.device)
    noise = gumbel_tile(torch.full_like(positions, 3), positions, 0, 4096, torch.float32).double()
    n = noise.numel()
    assert abs(noise.mean() - 0.5772157) < 4 * 1.2825 / n**0.5
    assert abs(noise.var() - torch.pi**2 / 6) < 4 * (4.4 * torch.pi**4 / 36 / n) ** 0.5
    # Neighbours have nothing to do with each other: tokens, fours of tokens, and positions.
    centred = noise - noise.mean()
    for a, b in (
        (centred[:, 1:], centred[:, :-1]),
        (centred[:, 4:], centred[:, :-4]),
        (centred[1:], centred[:-1]),
    ):
        assert abs((a * b).mean()) < 4 * 1.645 / n**0.5
