"""Liger's kernels in Triton's interpreter, which lacks three things that they ask for."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def install() -> None:
    """From here on a kernel is given floats as scalars of the language, which can be cast;
    functions of CUDA's libdevice, which is not there, are those of the language; and sums and
    products of bfloat16 numbers are theirs, not those of the integers they are kept in."""
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm

    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    implicit_cvt, binary_op = interpreter._implicit_cvt, builder.binary_op

    def convert(arg: Any) -> Any:
        if not isinstance(arg, float):
            return implicit_cvt(arg)
        number = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
        return tl.tensor(number, tl.float32)

    def compute(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary_op(self, lhs, rhs, op)
        wide = [interpreter.TensorHandle(_widened(x.data), tl.float32) for x in (lhs, rhs)]
        return self.cast_impl(binary_op(self, *wide, op), tl.bfloat16)

    interpreter._implicit_cvt = convert
    builder.binary_op = compute
    # Looked up while a kernel runs, when the language is the interpreter's.
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1


def _widened(bits: Any) -> Any:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
