"""Liger's kernels in Triton's interpreter, which lacks two things that they ask for."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def install() -> None:
    """From here on a kernel is given floats as scalars of the language, which can be cast, and the
    functions of CUDA's libdevice, which is not there, are those of the language."""
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm

    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter._implicit_cvt

    def convert(arg: Any) -> Any:
        if not isinstance(arg, float):
            return plain(arg)
        number = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32)
        return tl.tensor(number, tl.float32)

    interpreter._implicit_cvt = convert
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # looked up while a kernel runs
    geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1
