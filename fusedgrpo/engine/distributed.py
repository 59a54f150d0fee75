"""The processes that train together: each holds the whole model and does its share of every step.

Prompts are sampled, rewarded and trained on in shares; what came of them is gathered, so that every
process knows the whole rollout, and gradients are summed. Nothing has to divide anything, and the
run is that of one process, but for the order of sums.
"""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusedgrpo import host
from fusedgrpo.engine.interrupts import Interrupted
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import ConfigError, ModelError, ProcessError

T = TypeVar("T")

# Of waiting for the slowest process; a dead one is noticed by the launcher long before.
TIMEOUT = datetime.timedelta(hours=1)
BUCKET_BYTES = 64 << 20

SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}


class Processes:
    """``size`` processes, of which this one has the number ``rank``. Number 0 shows and writes."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank = rank
        self.size = size
        # Objects go over gloo also where gradients go over NCCL: it waits on the CPU, where a
        # signal is seen, and says so when a peer is gone.
        self._objects: Any = None

    @classmethod
    def start(cls, use_cpu: bool) -> Processes:
        """The processes that ``accelerate launch`` or ``torchrun`` has started, connected.

        On GPUs each process makes the one of its local rank its current device. Raises ConfigError
        where the launcher was told to shard the model.
        """
        sharded = [name for key, name in SHARDED.items() if _is_true(os.environ.get(key))]
        if sharded:
            raise ConfigError(
                f"The launcher asks for {sharded[0]}, but here every process holds the whole "
                "model. Launch with plain data parallelism (accelerate launch --multi_gpu), or "
                "use fusedgrpo.integrations.trl.FusedGRPOTrainer for sharded models."
            )
        on_cpu = use_cpu or not host.has_gpu()
        if _is_true(os.environ.get("ACCELERATE_USE_CPU")) and not on_cpu:
            raise ConfigError("The launcher was told to use the CPU: set use_cpu: true as well.")
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
        if state.num_processes != int(os.environ["WORLD_SIZE"]):
            raise ConfigError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate sees "
                f"{state.num_processes} processes: start them with accelerate launch or torchrun, "
                "which set RANK and LOCAL_RANK as well."
            )
        if state.process_index:
            _say_errors_only()
        processes = cls(state.process_index, state.num_processes)
        processes._objects = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        return processes

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of ``range(count)``."""
        before, after = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return range(before, after)

    def derive(self, seed: int, *purpose: int | str) -> int:
        """``derive``, another seed in each process; that of process 0 is that of a lone one."""
        return derive(seed, *purpose, *([f"process {self.rank}"] if self.rank else []))

    def gather(self, value: T) -> list[T]:
        """The ``value`` of every process, in order. It travels pickled: tensors on the CPU only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._objects)
        return values

    def run_everywhere(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` in every process; returns what it returned in each, in order.

        Where it fails in one, it fails in all: there with its own error, elsewhere with a
        ProcessError, and nobody is left waiting.
        """
        if self.size == 1:
            return [work()]
        result: Any = None
        failure: Exception | Interrupted | None = None
        try:
            result = work()
        except (Exception, Interrupted) as error:  # noqa: BLE001 - raised below, to all
            failure = error
        outcomes = self.gather((result, failure and f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, said) in enumerate(outcomes):
            if said is not None:
                raise ProcessError(f"Process {rank} of {self.size} failed: {said}")
        return [result for result, _ in outcomes]

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Run ``work`` in process 0 alone; every process gets what it returned."""
        result: Any = self.run_everywhere(lambda: work() if self.is_main else None)[0]
        return result

    def check_equal(self, values: dict[str, object]) -> None:
        """Raise ConfigError unless all ``values`` are the same in all processes."""
        everywhere = self.gather(values)
        for rank, theirs in enumerate(everywhere):
            for name, first in everywhere[0].items():
                if theirs[name] != first:
                    raise ConfigError(
                        f"{name} is {theirs[name]!r} in process {rank} and {first!r} in process 0: "
                        "expected the same in all of them."
                    )

    def check_equal_weights(self, model: nn.Module) -> None:
        """Raise ModelError unless all weights are the same in all processes, by their sums."""
        if self.size == 1:
            return
        # As text: a NaN is equal to itself there.
        ours = {
            name: repr(p.detach().sum(dtype=torch.float64).item())
            for name, p in model.named_parameters()
        }
        for rank, theirs in enumerate(self.gather(ours)):
            for name, value in ours.items():
                if theirs.get(name) != value:
                    raise ModelError(
                        f"Process {rank} has another {name} than process {self.rank}. Load the "
                        "model from the same files in every process, or set the same seed before "
                        "anything of it is initialised."
                    )

    def all_reduce_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over all processes.

        A parameter that has one in some processes counts as zero in the others; without one
        anywhere it stays without.
        """
        if self.size == 1:
            return
        device = parameters[0].device
        present = torch.tensor([p.grad is not None for p in parameters], device=device).int()
        torch.distributed.all_reduce(present, op=torch.distributed.ReduceOp.MAX)
        somewhere = [p for p, there in zip(parameters, present.tolist(), strict=True) if there]
        for parameter in somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(somewhere):
            if len(bucket) == 1:
                torch.distributed.all_reduce(bucket[0].grad)
                continue
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            torch.distributed.all_reduce(flat)
            sums = flat.split([p.numel() for p in bucket])
            for parameter, values in zip(bucket, sums, strict=True):
                parameter.grad = values.view_as(parameter)


def _buckets(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Runs of parameters of one dtype and device, of at most ``BUCKET_BYTES`` or a single one."""
    buckets: list[list[Tensor]] = []
    size = 0
    for p in parameters:
        own = p.numel() * p.element_size()
        last = buckets[-1][-1] if buckets else None
        alike = last is not None and (p.dtype, p.device) == (last.dtype, last.device)
        if not alike or size + own > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += own
    return buckets


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes")


def _say_errors_only() -> None:
    """In every process but the first: what all would say is said once."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("fusedgrpo").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
