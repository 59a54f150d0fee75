"""Kernels around the device functions of ``sample/philox_triton.py``, for tests of their values."""

import torch
import triton
import triton.language as tl

from fusedgrpo.kernels.sample.philox_triton import gumbel, philox4x32, token_bits


@triton.jit
def _words_kernel(words_ptr, out_ptr):
    a, b = tl.load(words_ptr).to(tl.uint32), tl.load(words_ptr + 1).to(tl.uint32)
    c, d = tl.load(words_ptr + 2).to(tl.uint32), tl.load(words_ptr + 3).to(tl.uint32)
    key_0, key_1 = tl.load(words_ptr + 4).to(tl.uint32), tl.load(words_ptr + 5).to(tl.uint32)
    a, b, c, d = philox4x32(a, b, c, d, key_0, key_1)
    tl.store(out_ptr, a.to(tl.int64))
    tl.store(out_ptr + 1, b.to(tl.int64))
    tl.store(out_ptr + 2, c.to(tl.int64))
    tl.store(out_ptr + 3, d.to(tl.int64))


@triton.jit
def _bits_kernel(seed_ptr, position_ptr, out_ptr, first_quad, QUADS: tl.constexpr):
    row = tl.program_id(0)
    quads = first_quad + tl.arange(0, QUADS)
    bits = token_bits(tl.load(seed_ptr + row), tl.load(position_ptr + row), quads)
    tl.store(out_ptr + row * 4 * QUADS + tl.arange(0, 4 * QUADS), bits.to(tl.int64))


@triton.jit
def _gumbel_kernel(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, gumbel(tl.load(bits_ptr + at).to(tl.uint32)))


def philox_words(words: torch.Tensor) -> torch.Tensor:
    """``[4]`` of counter and key, ``[6]``; all int64."""
    out = torch.zeros(4, dtype=torch.int64, device=words.device)
    _words_kernel[(1,)](words, out)
    return out


def bits_of_tokens(seeds: torch.Tensor, positions: torch.Tensor, first: int) -> torch.Tensor:
    """``[M, 32]``: those of tokens ``first .. first + 32``; first is a multiple of 4."""
    out = torch.zeros(len(seeds), 32, dtype=torch.int64, device=seeds.device)
    _bits_kernel[(len(seeds),)](seeds, positions, out, first // 4, QUADS=8)
    return out


def gumbel_of_bits(bits: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(bits), device=bits.device)
    _gumbel_kernel[(1,)](bits, out, BLOCK=len(bits))
    return out
