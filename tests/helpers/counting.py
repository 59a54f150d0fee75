"""What an operation costs, seen from below: matmul FLOPs and bytes alive, by dispatch."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# How the product's operands are found among the arguments.
_MATMULS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1}


class Cost(TorchDispatchMode):
    """Counts while it is on.

    flops: 2 M N K of every matrix product, in the bodies of our custom operators too.
    peak: the most bytes that storages made meanwhile held at one time; in_use: those now;
    kept: those at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.in_use = 0
        self.peak = 0
        self.kept = 0
        self._seen: dict[int, Any] = {}

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.kept = self.in_use

    def watch(self, *tensors: torch.Tensor) -> None:
        """Leaves the storages of ``tensors``, made outside, out of the count."""
        for t in tensors:
            storage = t.untyped_storage()
            self._seen.setdefault(storage._cdata, weakref.ref(storage))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.watch(*(x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)))
        if func.namespace == "fusedgrpo":
            with self:  # an operator's body runs below the mode: count inside it too
                out = _body(func)(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        name = func._schema.name
        if name in _MATMULS:
            a, b = args[_MATMULS[name]], args[_MATMULS[name] + 1]
            self.flops += 2 * a.numel() * b.shape[-1]
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen and self._seen[key]() is not None:
            return
        size = storage.nbytes()
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

        def freed(_: Any) -> None:
            self.in_use -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)


class Reads(TorchDispatchMode):
    """Counts, while it is on, how many elements of ``pool`` operators read: views none, a selection
    what it selects, all else what it is given."""

    def __init__(self, pool: torch.Tensor) -> None:
        super().__init__()
        self.elements = 0
        self._pool = pool.untyped_storage()._cdata

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "fusedgrpo":
            with self:
                return _body(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if not func.is_view:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata == self._pool:
                    selects = func._schema.name == "aten::index_select"
                    self.elements += out.numel() if selects else x.numel()
        return out


def _body(func: Any) -> Any:
    """The Python function behind one of our custom operators."""
    return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn
