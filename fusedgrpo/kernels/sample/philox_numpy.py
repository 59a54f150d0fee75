"""Philox of ``philox.py`` on a CPU: the same bits, in a third of torch's time.

numpy has unsigned words of 64 bits, so a product of two 32-bit words is one multiplication. Shapes
grow by broadcasting: of a counter only one word differs between tokens and of a key none, so most
of the first two rounds runs over rows or tokens alone. Shapes: R rows, Q fours of tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedgrpo.kernels.sample.philox import KEY_STEPS, MULTIPLIERS, PURPOSE, ROUNDS, WORD

# Fours of tokens that are computed together: arrays of 128 KiB stay in the cache of a core, and a
# call of numpy takes longer than its start.
TOGETHER = 2**14

Words = np.ndarray[Any, np.dtype[np.uint64]]
_WORD, _HALF, _PURPOSE = np.uint64(WORD), np.uint64(32), np.uint64(PURPOSE)
_MULTIPLIERS, _KEY_STEPS = np.array(MULTIPLIERS, np.uint64), np.array(KEY_STEPS, np.uint64)


def token_bits(
    seeds: np.ndarray[Any, Any], positions: np.ndarray[Any, Any], first: int, quads: int
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """``[R, 4 * quads]``: the bits of tokens from ``4 * first`` on, for int64 ``[R]`` seeds and
    positions."""
    bits = np.empty((len(seeds), quads, 4), np.uint32)
    counters = np.arange(first, first + quads, dtype=np.uint64)
    rows = max(TOGETHER // quads, 1)
    for lo in range(0, len(seeds), rows):
        block = slice(lo, lo + rows)
        words = _philox(counters, positions[block].view(np.uint64), seeds[block].view(np.uint64))
        for word, values in enumerate(words):
            bits[block, :, word] = values
    return bits.reshape(len(seeds), 4 * quads)


def _philox(counters: Words, positions: Words, seeds: Words) -> tuple[Words, ...]:
    """Four words, each ``[R, Q]``, for ``counters [Q]`` of each row."""
    a, b, c = counters[None], (positions & _WORD)[:, None], (positions >> _HALF)[:, None]
    d = np.full_like(b, _PURPOSE)
    key_0, key_1 = (seeds & _WORD)[:, None], (seeds >> _HALF)[:, None]
    for done in range(ROUNDS):
        if done < 3:  # until then some words are narrower than what they become
            product_a, product_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
            b, d = b ^ key_0, d ^ key_1
            b, d = b ^ (product_c >> _HALF), d ^ (product_a >> _HALF)
        else:
            product_a, product_c = a, c
            product_a *= _MULTIPLIERS[0]
            product_c *= _MULTIPLIERS[1]
            b ^= key_0
            d ^= key_1
            b ^= product_c >> _HALF
            d ^= product_a >> _HALF
        product_a &= _WORD
        product_c &= _WORD
        a, b, c, d = b, product_c, d, product_a
        key_0, key_1 = (key_0 + _KEY_STEPS[0]) & _WORD, (key_1 + _KEY_STEPS[1]) & _WORD
    return a, b, c, d
