"""Steps of decoding that are recorded once and replayed: CUDA graphs, one for each bucket of rows.

A step of a 7B model is some thousand kernels of a few microseconds, which Python and the driver
launch more slowly than the GPU runs them. A graph launches all of them at once. It reads and writes
the same addresses each time: a step's rows are copied into those of a blank step of the bucket's
size, whose other rows touch a spare page.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fusedgrpo.models.decode_step import DecodeStep

log = logging.getLogger("fusedgrpo")

Result = tuple[Tensor, Tensor]
# Runs the function once while it records it; the result, and what runs it again into that result.
Record = Callable[[Callable[[], Result]], tuple[Result, Callable[[], None]]]

# How far log-probs of a replayed step may be from those of the step itself: with another number of
# rows the library's products may round in another way, and 16 bits are coarse.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
TOLERANCE_16_BIT = 0.25


class Steps(Protocol):
    """The decoder whose steps are recorded."""

    dtype: torch.dtype
    rows: int

    def advance(self, step: DecodeStep) -> Result:
        """The step itself: tokens and log-probs, ``[M]`` each. Done twice, it is the same again."""

    def blank(self, rows: int) -> DecodeStep:
        """A step of rows that nobody has, with tables as wide as any."""


class Recorded(NamedTuple):
    step: DecodeStep
    blank: DecodeStep
    result: Result
    replay: Callable[[], None]


class StepGraphs:
    """Recorded steps of one decoder, one for each bucket of rows that was met. Where one cannot be
    recorded, or does not give what the step itself gives, that is said, and steps run by themselves
    from then on."""

    def __init__(self, record: Record | None = None):
        self.record = record or CudaGraphs()
        self.works = True
        self.buckets: dict[int, Recorded] = {}

    def run(self, steps: Steps, step: DecodeStep) -> Result:
        """``steps.advance(step)``."""
        if not self.works:
            return steps.advance(step)
        rows = bucket(len(step), steps.rows)
        if rows not in self.buckets:
            result = steps.advance(step)
            self._record(steps, step, rows, result)
            return result
        recorded = self.buckets[rows]
        step.write_into(recorded.step, recorded.blank)
        recorded.replay()
        tokens, logp = recorded.result  # which the next replay writes over
        return tokens[: len(step)].clone(), logp[: len(step)].clone()

    def _record(self, steps: Steps, step: DecodeStep, rows: int, expected: Result) -> None:
        own, blank = steps.blank(rows), steps.blank(rows)
        step.write_into(own, blank)
        try:
            result, replay = self.record(lambda: steps.advance(own))
            replay()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what cannot be recorded: CUDA has many words for it
            self._give_up(str(error).splitlines()[0])
            return
        same = result[0][: len(step)] == expected[0]
        off = (result[1][: len(step)] - expected[1]).abs()
        worst = float(off[same].nan_to_num(0).max()) if same.any() else 0.0
        # A token may turn where two are tied to rounding, but not most of them.
        if 2 * int(same.sum()) < len(step) or worst > TOLERANCE.get(steps.dtype, TOLERANCE_16_BIT):
            turned = len(step) - int(same.sum())
            self._give_up(f"{turned} of {len(step)} tokens turn, log-probs are off by {worst:.1e}")
            return
        self.buckets[rows] = Recorded(own, blank, result, replay)

    def _give_up(self, why: str) -> None:
        self.works = False
        self.buckets.clear()
        log.warning("Sampling without CUDA graphs, which is slower: %s.", why.rstrip("."))


def bucket(rows: int, most: int) -> int:
    """The rows of the graph for ``rows`` sequences: a power of four up to 64, of two beyond;
    ``most`` at the most.

    A rollout ends with every number of rows down to one. On an H200 a step of a 7B model takes
    6.4 ms with 8 rows and 7.6 with 64, for it is the weights that are read, and to record one takes
    as long as 20 are replayed: blank rows are cheaper than more graphs.
    """
    bits = (rows - 1).bit_length()
    return min(1 << (bits + bits % 2 if bits <= 6 else bits), most)


class CudaGraphs:
    """``Record`` on the current CUDA device.

    All graphs take their memory from one pool, else each would keep that of a whole step for
    itself. So one writes over what another one left there, its result included: they are replayed
    one at a time, and a result is copied before the next.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        # Once on another stream first: libraries set themselves up in their first call, which must
        # not be recorded.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return result, graph.replay
