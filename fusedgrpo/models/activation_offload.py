"""Activation offload: what autograd saves for the backward pass waits in host memory.

Around a forward pass with gradient checkpointing, what is saved are the inputs of the layers, one
``[1, T, H]`` each, and a few tensors of the last norm and the head. Each is copied to the host
while the next layers compute, and comes back while the layer behind it is computed backward:

forward, saving n:  start copying n to the host; let go of n - 2, behind its copy.
backward, using n:  start fetching n - 1; compute waits for n alone.

So two of them are on the device at any time, and the last two never leave it before they are used.
Values, strides and dtypes come back as they were: storages are copied as bytes.

Two streams, that of the computation and a side stream with all copies in order. The host never
waits. A device buffer belongs to the stream of the computation from allocation to release: copies
start behind all that was issued there, and it waits for a copy before the buffer is let go. That is
what makes memory bounded, which ``record_stream`` would not: with it a buffer is free when the
allocator happens to notice.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fusedgrpo.errors import ConfigError

# Bytes of a piece of host memory. All are alike, so that none is too small for a longer
# micro-batch; a power of two, to which torch rounds what it page-locks.
CHUNK = 4 << 20

# Saved storages that stay on the device behind the forward pass.
KEPT = 2

Pairs = Iterable[tuple[Tensor, Tensor]]


class Streams(Protocol):
    """Where copies run, beside the computation."""

    def new_chunk(self) -> Tensor:
        """``[CHUNK]`` uint8 of host memory that can be copied from and to."""

    def copy(self, pairs: Pairs) -> Any:
        """Start copies ``(to, from)`` behind everything issued so far; an event: they are done."""

    def wait(self, event: Any) -> None:
        """The computation goes on behind ``event``."""


class CudaStreams:
    """A side stream of one CUDA device. The computation's is the current one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.side = torch.cuda.Stream(device)

    def new_chunk(self) -> Tensor:
        return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)

    def copy(self, pairs: Pairs) -> torch.cuda.Event:
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.side.record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)


class NoStreams:
    """On the CPU everything happens at once."""

    def new_chunk(self) -> Tensor:
        return torch.empty(CHUNK, dtype=torch.uint8)

    def copy(self, pairs: Pairs) -> bool:
        for to, source in pairs:
            to.copy_(source)
        return True

    def wait(self, event: bool) -> None:
        pass


class OffloadActivations(saved_tensors_hooks):
    """``with offload: loss = ...``; the backward pass may run inside or behind it.

    Made once per run: host memory is page-locked when first needed and used again after that. It
    comes to what one micro-batch saves, for T tokens ``layers * H * itemsize * T`` bytes, what the
    last norm and the head save (a few ``[T, H]``), and up to ``CHUNK`` for each of them.

    device: CUDA or CPU; what is saved on another one stays there. min_bytes: of storages that move;
    smaller ones stay, and parameters, their views, tensor subclasses and integers. streams: a
    stand-in for those of the device. Raises ConfigError for other devices.

    All forward and backward passes are expected on one stream. As without offload, RuntimeError if
    a tensor was modified in place after it had been saved; where its copy was complete by then, the
    copy counts.
    """

    def __init__(
        self,
        device: torch.device | str,
        *,
        min_bytes: int = 1 << 20,
        streams: Streams | None = None,
    ):
        super().__init__(self._pack, self._unpack)
        device = torch.device(device)
        if device.type not in ("cuda", "cpu"):
            raise ConfigError(
                f"activation_offloading: true on a device of type {device.type}; it can move "
                "activations of CUDA and CPU. Leave it out."
            )
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if streams is None:
            streams = CudaStreams(device) if device.type == "cuda" else NoStreams()
        self.device = device
        self.min_bytes = max(min_bytes, 1)
        self._host = _Host(streams)
        # Nothing here keeps a tensor alive: autograd's graph does, and if an error takes the graph
        # away, nothing is left of it.
        self._known: weakref.WeakValueDictionary[int, _Moved] = weakref.WeakValueDictionary()
        self._newest: deque[Callable[[], _Moved | None]] = deque([_nothing] * KEPT)
        self._used: Callable[[], _Moved | None] = _nothing
        self._ahead: Callable[[], _Moved | None] = _nothing

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory taken so far; it stays for the next micro-batch."""
        return self._host.chunks * CHUNK

    def _pack(self, tensor: Tensor) -> _Packed | _Stays:
        if not self._moves(tensor):
            # Detached: an output that its own node saves would otherwise keep that node alive.
            return _Stays(tensor.detach(), tensor._version)
        storage = tensor.untyped_storage()
        moved = self._known.get(storage._cdata)
        if moved is None or not moved.is_of(storage, tensor._version):
            moved = _Moved(tensor, self._newest[-1], self._host)
            self._known[storage._cdata] = moved
            self._newest.append(weakref.ref(moved))
            oldest = self._newest.popleft()()
            if oldest is not None:
                oldest.release()
        offset = int(tensor.storage_offset())
        return _Packed(moved, tensor.dtype, offset, tensor.size(), tensor.stride())

    def _moves(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor
            and tensor.device == self.device
            and tensor.layout is torch.strided
            and tensor.is_floating_point()
            and not tensor.is_neg()  # its bytes are not its values
            and tensor.untyped_storage().nbytes() >= self.min_bytes
            and not isinstance(tensor._base, nn.Parameter)
            # What is saved during a backward pass is used in it, and soon.
            and torch._C._current_graph_task_id() == -1
        )

    def _unpack(self, packed: _Packed | _Stays) -> Tensor:
        if isinstance(packed, _Stays):
            if packed.tensor._version != packed.version:
                raise _modified(packed.tensor.shape)
            return packed.tensor
        moved, dtype, *geometry = packed
        used = self._used()
        if used is not None and used is not moved:
            used.release()
        self._used = weakref.ref(moved)
        if moved.is_modified():
            raise _modified(packed.size)
        storage = moved.on_device()
        self._fetch_before(moved)
        return torch.empty(0, dtype=dtype, device=self.device).set_(storage, *geometry)

    def _fetch_before(self, moved: _Moved) -> None:
        before = moved.before()
        if before is None or before.storage is not None:
            return
        ahead = self._ahead()
        if ahead is not None and ahead is not moved:
            ahead.release()  # fetched for an order that did not come
        before.fetch()
        self._ahead = weakref.ref(before)


class _Packed(NamedTuple):
    """A tensor as a view of what was moved."""

    moved: _Moved
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class _Stays(NamedTuple):
    tensor: Tensor
    version: int


class _Moved:
    """One saved storage: on the host, and on the device while ``storage`` is not None.

    before: the one that was saved before it, if it lives.
    """

    def __init__(self, tensor: Tensor, before: Callable[[], _Moved | None], host: _Host):
        self.before = before
        self.host = host
        self.storage: torch.UntypedStorage | None = tensor.untyped_storage()
        self.device = tensor.device
        self.nbytes = self.storage.nbytes()
        self.chunks: list[Tensor] = []
        self.fetched: Any = None  # event of a copy that was not waited for yet
        self.stored: Any = None
        self._original: Tensor | None = tensor.detach()  # shares the version counter
        self._version = tensor._version
        self._modified = False
        self._identity = weakref.ref(self.storage)
        self.chunks = host.take(-(-self.nbytes // CHUNK))
        self.stored = host.streams.copy(self._pairs(self.storage))

    def __del__(self) -> None:
        self.release()
        # A copy of them that still runs is ahead of the next one on the side stream.
        self.host.give(self.chunks)

    def is_of(self, storage: torch.UntypedStorage, version: int) -> bool:
        """Whether this is ``storage`` with its values of now: an address alone is used again."""
        return self._identity() is storage and self._version == version

    def is_modified(self) -> bool:
        """In place, before the copy was known to be complete."""
        if self._original is not None and self._original._version != self._version:
            self._modified = True
        return self._modified

    def on_device(self) -> torch.UntypedStorage:
        """The storage, for what is issued from here on."""
        storage = self.fetch()
        self._wait_fetched()
        return storage

    def fetch(self) -> torch.UntypedStorage:
        """Start copying it back unless it is there; not to be used before ``on_device``."""
        if self.storage is None:
            storage = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
            self.storage = storage.untyped_storage()
            self.fetched = self.host.streams.copy((b, a) for a, b in self._pairs(self.storage))
        return self.storage

    def release(self) -> None:
        """Let go of the device's copy, behind the copies of it that run."""
        self.is_modified()
        self._wait_fetched()
        if self.stored is not None:
            self.host.streams.wait(self.stored)
            self.stored = None
        self.storage = self._original = None

    def _wait_fetched(self) -> None:
        if self.fetched is not None:
            self.host.streams.wait(self.fetched)
            self.fetched = None

    def _pairs(self, storage: torch.UntypedStorage) -> Iterator[tuple[Tensor, Tensor]]:
        flat = torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage)
        for chunk, part in zip(self.chunks, flat.split(CHUNK), strict=True):
            yield chunk[: len(part)], part


class _Host:
    """Pieces of host memory: as many as were ever in use at once."""

    def __init__(self, streams: Streams):
        self.streams = streams
        self.chunks = 0
        self._free: list[Tensor] = []

    def take(self, count: int) -> list[Tensor]:
        while len(self._free) < count:
            self._free.append(self.streams.new_chunk())
            self.chunks += 1
        # One by one: the garbage collector may give some back at any moment.
        return [self._free.pop() for _ in range(count)]

    def give(self, chunks: list[Tensor]) -> None:
        self._free.extend(chunks)


def _nothing() -> None:
    return None


def _modified(shape: torch.Size) -> RuntimeError:
    return RuntimeError(
        f"A tensor of shape {list(shape)} that the backward pass needs was modified in place after "
        "the forward pass had saved it. Use the operation that is not in place."
    )
