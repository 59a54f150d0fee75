"""``install``: from then on this process has a CUDA device."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from cuda_twin import triton_runs
from cuda_twin.counts import Counting, Counts
from cuda_twin.dispatch import Dispatch
from cuda_twin.placement import Placement, Storages
from cuda_twin.runtime import Runtime
from cuda_twin.transfers import Transfers


class Twin:
    """The device that is not there."""

    def __init__(self) -> None:
        self.placement = Placement()
        self.counting = Counting()
        self._frozen = Storages()
        self._runtime = Runtime(self.placement, self.counting)

    def counted(self) -> contextlib.AbstractContextManager[Counts]:
        """What is asked of the device inside."""
        return self.counting.opened()

    @contextlib.contextmanager
    def of_capability(self, capability: tuple[int, int]) -> Iterator[None]:
        """Inside it is of another generation, as NVIDIA counts them; what has been asked of it
        before is asked again."""
        from fusedgrpo.kernels import backend
        from fusedgrpo.models import varlen_attention

        remembered = varlen_attention.varlen_kernel, backend._capability
        before, self._runtime.capability = self._runtime.capability, capability
        for answer in remembered:
            answer.cache_clear()
        try:
            yield
        finally:
            self._runtime.capability = before
            for answer in remembered:
                answer.cache_clear()

    def watch(self, model: nn.Module) -> None:
        """From here on casts of weights of ``model`` that do not train are called ``frozen``."""
        for parameter in model.parameters():
            if not parameter.requires_grad:
                self._frozen.add(parameter)

    def install(self) -> None:
        """In this thread and in those that it starts."""
        Transfers(self.placement, self.counting).install()
        self._runtime.install()
        triton_runs.install(self.placement, self.counting)
        run: Any = threading.Thread.run
        whole: Any = threading.Thread

        def run_dispatched(thread: threading.Thread) -> None:
            with self._dispatch():
                run(thread)

        whole.run = run_dispatched
        self._dispatch().__enter__()

    def _dispatch(self) -> Dispatch:
        return Dispatch(self.placement, self.counting, self._frozen)


def install() -> Twin:
    """To be called once, before anything is asked of CUDA. RuntimeError on a machine that has it,
    and where Triton is not interpreted."""
    if torch.cuda.is_available():
        raise RuntimeError("a machine with a GPU needs no CUDA twin")
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  # with a device it would look for its library of kernels
    twin = Twin()
    twin.install()
    return twin
