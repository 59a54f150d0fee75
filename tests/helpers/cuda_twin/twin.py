"""``install``: from then on this process has a CUDA device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import nn

from cuda_twin import triton_runs
from cuda_twin.counts import Counting, Counts
from cuda_twin.dispatch import Dispatch
from cuda_twin.placement import CUDA, Placement, Storages
from cuda_twin.runtime import Runtime
from cuda_twin.transfers import Transfers


class Twin:
    """The device that is not there. Its ``dispatch`` is on for good."""

    def __init__(self, capability: tuple[int, int]):
        self.placement = Placement()
        self.counting = Counting()
        self.dispatch = Dispatch(self.placement, self.counting)
        self.runtime = Runtime(self.placement, self.counting, capability)
        self.transfers = Transfers(self.placement, self.counting)

    def counted(self) -> contextlib.AbstractContextManager[Counts]:
        """What is asked of the device inside."""
        return self.counting.opened()

    @contextlib.contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Inside, casts of weights of ``model`` that do not train are called ``frozen``."""
        frozen = Storages()
        for parameter in model.parameters():
            if not parameter.requires_grad:
                frozen.add(parameter)
        self.dispatch.casts_of.append(("frozen ", frozen))
        try:
            yield
        finally:
            self.dispatch.casts_of.pop()


def install(capability: tuple[int, int] = (9, 0)) -> Twin:
    """To be called once, before anything is asked of CUDA. RuntimeError on a machine that has it,
    and where Triton is not interpreted."""
    if torch.cuda.is_available():
        raise RuntimeError("a machine with a GPU needs no CUDA twin")
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 has to be set before Python starts")
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401  # with a device it would look for its library of kernels
    twin = Twin(capability)
    twin.transfers.install()
    twin.runtime.install()
    triton_runs.install(twin.placement, twin.counting)
    twin.dispatch.__enter__()
    return twin


__all__ = ["CUDA", "Twin", "install"]
