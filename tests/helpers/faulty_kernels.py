"""Kernels with the faults that the ahead-of-time check has to find; never run.

Import with ``bench`` on the path, where ``aot_variants`` is.
"""

import triton
import triton.language as tl
from aot_variants import Variant

from fusedgrpo.kernels.launch import Launch


@triton.jit
def _scale_kernel(x, factor, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * factor)


@triton.jit
def _share_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    numbers = tl.load(at)
    tl.store(at, numbers / tl.sum(numbers, 0))


@triton.jit
def _count_kernel(x, BLOCK: tl.constexpr):
    numbers = tl.load(x + tl.arange(0, 64))
    tl.store(x + tl.arange(0, BLOCK), tl.histogram(numbers, BLOCK))


def _variant(kernel: triton.JITFunction, block: int, num_warps: int, **types: str) -> Variant:
    signature = {"x": "*fp32"} | types | {"BLOCK": "constexpr"}
    return Variant(
        kernel.__name__, kernel, signature, {"BLOCK": block}, Launch(block, num_warps=num_warps)
    )


def sound() -> Variant:
    return _variant(_scale_kernel, 128, 4, factor="fp32")


def float64() -> Variant:
    """A Python float that got here as one."""
    return _variant(_scale_kernel, 128, 4, factor="fp64")


def spilling() -> Variant:
    """256 numbers per thread that live at once: more than there are registers."""
    return _variant(_share_kernel, 8192, 1)


def too_much_shared() -> Variant:
    """A histogram keeps its bins in shared memory."""
    return _variant(_count_kernel, 32768, 16, x="*i32")
