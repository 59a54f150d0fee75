"""Functions of numbers that several Triton kernels call, where Triton has none or a poorer one.

Not libdevice's: the interpreter has no libdevice.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation, by Kahan's correction (Higham, Accuracy and Stability of
    Numerical Algorithms, section 1.14): u is exp(x) rounded."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where(u == 0.0, -1.0, (u - 1.0) * x / tl.log(u)))


@triton.jit
def tanh(x):
    """By expm1, which keeps the digits of small x."""
    t = expm1(-2.0 * tl.abs(x))
    tanh = -t / (2.0 + t)
    return tl.where(x < 0, -tanh, tanh)


@triton.jit
def log1p(y):
    """log(1 + y) by Kahan's correction."""
    u = 1.0 + y
    return tl.where(u == 1.0, y, tl.log(u) * y / (u - 1.0))


@triton.jit
def softplus(x):
    """log(1 + exp(x))"""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def clamp(x, least, most):
    """Like torch's: NaN stays NaN, where tl.clamp loses it."""
    return tl.where(x > most, most, tl.where(x < least, least, x))
