"""Triton 3.6's interpreter beside numpy 2.5, which refuses two things that it does."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def work_with_this_numpy() -> None:
    """Let interpreted kernels use a scalar as an index (the end of a ``range`` above all) and turn
    the bits of unsigned integers around. As newer versions of Triton do it by themselves."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain_patch = interpreter._patch_lang_tensor
    plain_ones = interpreter.InterpreterBuilder.get_all_ones_value

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        # Scalars are arrays of one dimension there.
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    def all_ones(builder: Any, dtype: Any) -> Any:
        np_type = interpreter._get_np_dtype(dtype)
        if not np.issubdtype(np_type, np.unsignedinteger):
            return plain_ones(builder, dtype)
        ones = np.full(1, np.iinfo(np_type).max, dtype=np_type)
        return interpreter.TensorHandle(ones, dtype.scalar)

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.get_all_ones_value = all_ones
