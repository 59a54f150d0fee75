"""``torch.cuda`` with one device, and autocast for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cuda_twin.counts import Counting
from cuda_twin.placement import CUDA, Placement

MEMORY = 80 << 30


class Runtime:
    """capability: of the device, as NVIDIA counts it."""

    def __init__(self, placement: Placement, counting: Counting):
        self.placement = placement
        self.counting = counting
        self.capability = (9, 0)

    def install(self) -> None:
        cuda: Any = torch.cuda
        for name, value in self._answers().items():
            setattr(cuda, name, value)
        self._install_autocast()
        whole: Any = torch._C
        whole._group_tensors_by_device_and_dtype = self._grouped(
            whole._group_tensors_by_device_and_dtype
        )

    def _answers(self) -> dict[str, Any]:
        def number(value: int) -> Callable[..., int]:
            return lambda *args, **kwargs: value

        def nothing(*args: Any, **kwargs: Any) -> None:
            return None

        counting = self.counting

        def waits(what: str) -> Callable[..., None]:
            return lambda *args, **kwargs: counting.note("waits", what)

        def properties(device: Any = None) -> SimpleNamespace:
            major, minor = self.capability
            return SimpleNamespace(
                name="a CUDA twin",
                major=major,
                minor=minor,
                total_memory=MEMORY,
                multi_processor_count=132,
            )

        class Event(_Event):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(counting)

        class Stream(_Stream):
            def __init__(self, *args: Any, **kwargs: Any):
                super().__init__(counting)

        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": nothing,
            "init": nothing,
            "device_count": number(1),
            "current_device": number(0),
            "set_device": nothing,
            "device": _device,
            "get_device_name": lambda device=None: "a CUDA twin",
            "get_device_capability": lambda device=None: self.capability,
            "get_device_properties": properties,
            "is_bf16_supported": lambda *args, **kwargs: self.capability >= (8, 0),
            "mem_get_info": lambda device=None: (MEMORY, MEMORY),
            "memory_allocated": number(0),
            "max_memory_allocated": number(0),
            "memory_reserved": number(0),
            "max_memory_reserved": number(0),
            "reset_peak_memory_stats": nothing,
            "empty_cache": nothing,
            "ipc_collect": nothing,
            "synchronize": waits("torch.cuda.synchronize"),
            # Random numbers are the CPU's, whose state is kept with these.
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "get_rng_state_all": lambda: [torch.get_rng_state()],
            "set_rng_state": nothing,
            "set_rng_state_all": nothing,
            "manual_seed": nothing,
            "manual_seed_all": nothing,
            "Event": Event,
            "Stream": Stream,
            "current_stream": lambda device=None: Stream(),
            "default_stream": lambda device=None: Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: False,
        }

    def _install_autocast(self) -> None:
        """Autocast on CUDA is that of the CPU, which casts for the same products."""
        plain: Any = torch.autocast.__init__

        def init(autocast: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
            plain(autocast, _computed_on(device_type), *args, **kwargs)

        whole: Any = torch
        whole.autocast.__init__ = init
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            setattr(whole, name, _asked_of_the_cpu(getattr(torch, name)))

    def _grouped(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """As optimizers and norms ask for tensors that one kernel can take together."""

        def grouped(lists: list[list[Tensor | None]], with_indices: bool = False) -> Any:
            found = {}
            for (device, dtype), rest in plain(lists, with_indices).items():
                there = {self.placement.on_cuda(x) for x in rest[0][0] if x is not None}
                if len(there) > 1:
                    raise NotImplementedError("tensors of both devices in one optimizer")
                found[CUDA if there == {True} else device, dtype] = rest
            return found

        return grouped


def _computed_on(device_type: str) -> str:
    return "cpu" if device_type == "cuda" else device_type


def _asked_of_the_cpu(plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda device_type="cuda": plain(_computed_on(device_type))


class _Event:
    """What was launched before it is done when the host has waited for it. That is no pause for the
    device where more was launched after it."""

    def __init__(self, counting: Counting):
        self._counting = counting
        self._recorded = 0

    def record(self, stream: Any = None) -> None:
        self._recorded = self._counting.launched

    def synchronize(self) -> None:
        if self._counting.launched == self._recorded:
            self._counting.note("waits", "an event with nothing launched after it")

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True


class _Stream:
    device = CUDA

    def __init__(self, counting: Counting):
        self._counting = counting

    def synchronize(self) -> None:
        self._counting.note("waits", "a stream")

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event(self._counting)
        event.record()
        return event

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


class _device(contextlib.nullcontext[None]):
    def __init__(self, device: Any):
        super().__init__()
