"""The progress bars of transformers' loading, told to ``stages`` in place of drawn one by one."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fusedgrpo import stages


class _Counted:
    """As much of a tqdm bar as loading uses: it is iterated, and everything else does nothing."""

    def __init__(self, iterable: Iterable[Any] = (), **options: Any):
        self._items = iterable
        self._total = options.get("total")

    def __iter__(self) -> Iterator[Any]:
        return stages.count(self._items, "tensors", self._total)

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *error: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: None


@contextmanager
def told() -> Iterator[None]:
    """Inside, what loads or saves weights counts for the stage that it is in, and draws nothing."""
    from transformers.utils import logging as theirs

    with contextlib.ExitStack() as stack:
        if hasattr(theirs, "set_tqdm_hook"):
            hook = lambda make, given, options: _Counted(*given, **options)  # noqa: E731
            stack.callback(theirs.set_tqdm_hook, theirs.set_tqdm_hook(hook))
        yield


@contextmanager
def told_of_gguf() -> Iterator[None]:
    """Like ``told``, for the bar of GGUF files, which no setting of transformers reaches."""
    try:
        reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    except ImportError:
        reader = None
    bar = vars(reader).get("tqdm") if reader is not None else None
    if bar is None:  # another version reads them elsewhere
        yield
        return
    reader.tqdm = _Counted
    try:
        yield
    finally:
        reader.tqdm = bar
