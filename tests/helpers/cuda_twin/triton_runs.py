"""Triton kernels on the device that is not there: interpreted, and counted."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from interpreter import work_with_this_numpy
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from cuda_twin.counts import Counting
from cuda_twin.placement import Placement


def install(placement: Placement, counting: Counting) -> None:
    """RuntimeError where kernels are not interpreted in this process."""
    import triton
    import triton.language as tl

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    plain = interpreter.GridExecutor.__call__
    patch_language = interpreter._patch_lang
    work_with_this_numpy()
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        """The interpreter puts its functions in the language's place for a kernel, and once more
        for each function that it calls: a third of its time."""
        visible = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if visible <= patched:
            return interpreter._LangPatchScope()
        patched.update(visible)
        return patch_language(fn)

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not placement.on_cuda(x):
                raise RuntimeError(
                    f"Pointer argument of {executor.fn.__name__} cannot be accessed from Triton "
                    f"(cpu tensor {list(x.shape)}?)"
                )
        counting.note("launches", f"triton::{executor.fn.__name__}")
        patched.clear()
        with placement.hidden(), no_dispatch():
            plain(executor, *args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpreterBuilder.cast_impl = _rounds(interpreter)


def _rounds(interpreter: Any) -> Any:
    """The interpreter cuts float32 off where a GPU rounds it to the nearest bfloat16."""
    import triton.language as tl

    plain = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(builder: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return plain(builder, source, to)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        kept = np.where(np.isnan(source.data), bits | np.uint32(0x400000), even)
        return interpreter.TensorHandle((kept >> np.uint32(16)).astype(np.uint16), tl.bfloat16)

    return cast_impl
