"""Which storages pass for memory of a CUDA device, and which for pinned memory of the host."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

CUDA = torch.device("cuda", 0)

true_device: Any = torch._C.TensorBase.device.__get__


class Storages:
    """A set of storages that keeps none of their memory.

    A weak reference keeps the address of its storage from being used again, so an address that is
    in the set is that of the storage that was put there.
    """

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self._crowded = 1024

    def add(self, tensor: Tensor) -> None:
        address = torch._C._storage_id(tensor)
        if address not in self._known:
            self._known[address] = StorageWeakRef(tensor.untyped_storage())
        if len(self._known) > self._crowded:
            self._known = {a: ref for a, ref in self._known.items() if not ref.expired()}
            self._crowded = 2 * len(self._known) + 1024

    def __contains__(self, tensor: Tensor) -> bool:
        return torch._C._storage_id(tensor) in self._known


class Placement:
    """Where tensors are. Views are where their storage is."""

    def __init__(self) -> None:
        self.cuda = Storages()
        self.pinned = Storages()
        self._of_thread = threading.local()

    def is_of_twin(self, tensor: Tensor) -> bool:
        """Whether it is a real tensor of the CPU or of the device that is not there; others, such
        as meta tensors and fake ones, are nobody's business here."""
        return true_device(tensor).type == "cpu" and tensor.layout is torch.strided

    def on_cuda(self, tensor: Tensor) -> bool:
        shown = not getattr(self._of_thread, "hidden", False)
        return shown and self.is_of_twin(tensor) and tensor in self.cuda

    def device_of(self, tensor: Tensor) -> torch.device:
        return CUDA if self.on_cuda(tensor) else true_device(tensor)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, all tensors are of the CPU: for code that computes there in the device's name."""
        before = getattr(self._of_thread, "hidden", False)
        self._of_thread.hidden = True
        try:
            yield
        finally:
            self._of_thread.hidden = before
