"""Live bytes of tensors that do not exist: what a computation would allocate, without doing it.

Under torch's ``FakeTensorMode`` operators run on shapes alone. The tracker watches every operator
from above it, adds the storages that are new and takes them off again when the last tensor on them
is gone, as an allocator would. It knows nothing of fragmentation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What torch's caching allocator rounds a request up to.
BLOCK = 512


class Origin(NamedTuple):
    """Where a storage comes from, for the list of what was alive at the peak."""

    label: str
    op: str
    dtype: str
    shape: tuple[int, ...]


class Peak(NamedTuple):
    """bytes: the most that were alive at once. alive: of what, by origin."""

    bytes: int
    alive: dict[Origin, int]

    def by_label(self) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for origin, size in self.alive.items():
            totals[origin.label] += size
        return dict(totals.most_common())


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of storages made under it.

    bodies: by operator, what to run in its place under the tracker. For operators whose fake
    implementation returns results only, where the real one also needs scratch.
    """

    def __init__(self, bodies: Mapping[Any, Callable[..., Any]] | None = None):
        super().__init__()
        self.bodies = dict(bodies or {})
        self.live = 0
        self.label = ""
        self._sizes: dict[int, tuple[int, Origin]] = {}
        self._references: dict[int, Any] = {}
        self._alive: Counter[Origin] = Counter()
        self._highest = 0
        self._at_highest: dict[Origin, int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        body = self.bodies.get(func)
        if body is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = body(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf, func)
        return out

    def start_peak(self) -> None:
        """From here on, ``peak`` is of what comes."""
        self._highest, self._at_highest = self.live, None

    @property
    def peak(self) -> Peak:
        alive = self._alive if self._at_highest is None else self._at_highest
        return Peak(self._highest, {origin: n for origin, n in alive.items() if n})

    def alive(self) -> dict[str, int]:
        """Bytes that are alive now, by label."""
        return Peak(self.live, dict(self._alive)).by_label()

    @contextlib.contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages that are made inside are listed under ``label``."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def _see(self, tensor: Tensor, func: Any) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        dtype = str(tensor.dtype).removeprefix("torch.")
        origin = Origin(self.label, str(func), dtype, tuple(tensor.shape))
        self._sizes[key] = size, origin
        self._references[key] = weakref.ref(storage, lambda _: self._freed(key))
        self.live += size
        self._alive[origin] += size
        if self.live > self._highest:
            self._highest, self._at_highest = self.live, None

    def _freed(self, key: int) -> None:
        if self._at_highest is None and self.live == self._highest:
            self._at_highest = dict(self._alive)
        size, origin = self._sizes.pop(key)
        del self._references[key]
        self.live -= size
        self._alive[origin] -= size


@contextlib.contextmanager
def fake_tensors(tracker: StorageTracker) -> Iterator[StorageTracker]:
    """Inside, tensors are fake and ``tracker`` counts them."""
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        yield tracker
