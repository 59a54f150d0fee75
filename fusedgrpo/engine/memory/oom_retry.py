"""Out of memory in the middle of a run: free what can be freed, halve what is done at once, repeat.

The work that is repeated is a pure function of weights, samples and seeds, so what the run computes
does not change. The first repetition is of the very same work, for what fails is often
fragmentation or a neighbour on the card; only then is something halved, for the rest of the run.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from fusedgrpo import host
from fusedgrpo.errors import MemoryExhaustedError

T = TypeVar("T")

log = logging.getLogger("fusedgrpo")


@dataclass(slots=True)
class OOMRetry:
    """How much a run does at once, halved where memory runs out.

    tokens: packed tokens of a micro-batch (``tokens_per_microbatch``). in_flight: completions
    decoded together, None for all of a rollout. retries: repetitions since ``take_retries``.
    """

    tokens: int
    in_flight: int | None = None
    retries: int = 0

    def update(self, work: Callable[[], T], largest: Callable[[], int], what: str) -> T:
        """``work``, cut by ``tokens``. largest: tokens of its largest sequence, the floor."""

        def halve() -> str | None:
            floor = largest()
            if self.tokens <= floor:
                return None
            before, self.tokens = self.tokens, max(self.tokens // 2, floor)
            return f"tokens_per_microbatch {before} -> {self.tokens}"

        return self._until_it_fits(work, halve, what)

    def sample(self, work: Callable[[], T], completions: int) -> T:
        """``work``, which decodes as many as ``in_flight`` of ``completions`` together."""

        def halve() -> str | None:
            before = min(self.in_flight or completions, completions)
            if before <= 1:
                return None
            self.in_flight = before // 2
            return f"completions in flight {before} -> {self.in_flight}"

        return self._until_it_fits(work, halve, "sampling")

    def repeat(self, work: Callable[[], T], what: str) -> T:
        """``work``, of which there is nothing to cut."""
        return self._until_it_fits(work, lambda: None, what)

    def take_retries(self) -> int:
        """How often something was repeated since the last call."""
        taken, self.retries = self.retries, 0
        return taken

    def _until_it_fits(
        self, work: Callable[[], T], halve: Callable[[], str | None], what: str
    ) -> T:
        attempts = 0
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0]
            # Outside of the except clause: the frames that held the tensors are gone by now.
            release()
            self.retries += 1
            attempts += 1
            if attempts == 1:
                log.warning(
                    "Out of memory in %s; once more after emptying the cache. %s", what, said
                )
                continue
            change = halve()
            if change is None:
                raise MemoryExhaustedError(
                    f"Out of memory in {what}, with as little at once as there can be. {said} "
                    f"{free_memory()} Shorter completions (max_completion_length) or prompts, "
                    "load_in_4bit, gradient_checkpointing, activation_offloading or a smaller "
                    "lora_r need less: see "
                    "fusedgrpo plan."
                )
            log.warning("Out of memory in %s; %s for the rest of this run. %s", what, change, said)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of torch, of cuBLAS, of a Triton kernel's first load, of host
    memory that was to be page-locked, or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "DefaultCPUAllocator: not enough memory" in text
    )


def release() -> None:
    """Give back all memory that nothing refers to."""
    from accelerate.utils.memory import clear_device_cache

    gc.collect()
    clear_device_cache()


def free_memory() -> str:
    """The free memory as a sentence; empty without a GPU."""
    if not host.has_gpu():
        return ""
    free, total = host.gpu_memory()
    return f"Free: {free / 2**30:.2f} of {total / 2**30:.2f} GiB."
