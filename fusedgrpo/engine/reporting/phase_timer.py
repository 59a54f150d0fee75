"""Where the time and the memory of a step went."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Started by making it, read with ``metrics``. ``show`` is told each phase as it begins."""

    def __init__(self, show: Callable[[str], None] = lambda phase: None, *, on_gpu: bool = False):
        self._show = show
        self._on_gpu = on_gpu
        self._started = time.perf_counter()
        self._seconds = dict.fromkeys(("sample", "score", "update"), 0.0)
        self._peaks: dict[str, int] = {}
        self._inside: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as ``name``. A phase inside of another is taken out of that
        one's time, and is not shown: there are many of them."""
        started = time.perf_counter()
        if self._inside is not None:
            yield
            seconds = time.perf_counter() - started
            self._seconds[name] += seconds
            self._seconds[self._inside] -= seconds
            return
        self._show(name)
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._inside = name
        try:
            yield
        finally:
            self._inside = None
        if self._on_gpu:
            torch.cuda.synchronize()
            key, peak = f"memory/{name}", torch.cuda.max_memory_allocated()
            self._peaks[key] = max(self._peaks.get(key, 0), peak)  # a phase may come several times
        self._seconds[name] += time.perf_counter() - started

    def metrics(self, completion_tokens: int) -> dict[str, float]:
        """``time/...`` and ``step_time`` in seconds, ``tokens_per_second`` of completion tokens,
        ``memory/peak`` in bytes: on a GPU the highest of the step's phases, each of which is there
        as ``memory/sample``, ...; without one that of the process so far."""
        wall = time.perf_counter() - self._started
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = max(self._peaks.values(), default=own)
        return {
            **{f"time/{name}": seconds for name, seconds in self._seconds.items()},
            **self._peaks,
            "step_time": wall,
            "tokens_per_second": completion_tokens / wall,
            "memory/peak": peak,
        }
