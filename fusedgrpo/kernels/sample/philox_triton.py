"""The functions of ``philox.py`` for Triton kernels: the same bits."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from fusedgrpo.kernels.sample import philox
from fusedgrpo.kernels.triton_math import log1p

ROUNDS = tl.constexpr(philox.ROUNDS)
MULTIPLIER_A = tl.constexpr(philox.MULTIPLIERS[0])
MULTIPLIER_C = tl.constexpr(philox.MULTIPLIERS[1])
KEY_STEP_0 = tl.constexpr(philox.KEY_STEPS[0])
KEY_STEP_1 = tl.constexpr(philox.KEY_STEPS[1])
PURPOSE = tl.constexpr(philox.PURPOSE)


@triton.jit
def philox4x32(a, b, c, d, key_0, key_1):
    """Four random words; all arguments are uint32, tensors or scalars."""
    for _ in tl.static_range(ROUNDS):
        high_a, low_a = tl.umulhi(a, MULTIPLIER_A), a * MULTIPLIER_A
        high_c, low_c = tl.umulhi(c, MULTIPLIER_C), c * MULTIPLIER_C
        a, b, c, d = high_c ^ b ^ key_0, low_c, high_a ^ d ^ key_1, low_a
        key_0 += KEY_STEP_0
        key_1 += KEY_STEP_1
    return a, b, c, d


@triton.jit
def token_bits(seed, position, quads):
    """The bits of tokens ``4 * quads .. 4 * quads + 3``, in order: four times as many as quads."""
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    purpose = tl.full((), PURPOSE, tl.uint32)
    a, b, c, d = philox4x32(quads.to(tl.uint32), low, high, purpose, key_0, key_1)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def gumbel(bits):
    small = bits < 2147483648
    x = (tl.where(small, bits, ~bits).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32
    return -tl.log(-tl.where(small, log1p(-x), tl.log(x)))
