"""Liger's functions on tensors without storage: all of them but their kernels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

# Of liger_kernel.ops: what models/liger_layers.py lets into a model.
OPERATIONS = ("rms_norm", "rope", "swiglu", "geglu")


class _Unlaunched:
    """In place of a kernel: ``kernel[grid](...)`` does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


@contextlib.contextmanager
def kernels_left_out() -> Iterator[None]:
    """Inside, Liger's functions of autograd allocate, keep for the backward pass and give back what
    they always do, and nothing is computed. They are Liger's own, so that a release of it which
    keeps something else is planned as it is."""
    from triton.runtime import KernelInterface

    modules = [importlib.import_module(f"liger_kernel.ops.{name}") for name in OPERATIONS]
    kernels = [
        (module, name, kernel)
        for module in modules
        for name, kernel in vars(module).items()
        if isinstance(kernel, KernelInterface)
    ]
    for module, name, _ in kernels:
        setattr(module, name, _Unlaunched())
    try:
        yield
    finally:
        for module, name, kernel in kernels:
            setattr(module, name, kernel)
