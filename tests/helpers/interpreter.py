"""Triton's interpreter on numpy's arrays, in the versions that differ."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np


def read_one_number_of_an_array() -> None:
    """Let Triton's interpreter use a scalar as an index, the end of a ``range`` above all.

    It keeps scalars as arrays of one dimension. Triton 3.6 calls ``int`` on them, which numpy
    refuses since 2.4; newer versions of Triton take the dimension away first, as this does.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.squeeze(self.handle.data)))

    interpreter._patch_lang_tensor = patch_tensor
