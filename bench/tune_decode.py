"""Searches the launch parameters of ``decode_attention`` on this GPU.

    python bench/tune_decode.py --cases 64x512+500,8x512+500,64x2048+1000

A case is completions in flight (eight to a prompt), tokens of a prompt, tokens of a completion so
far; heads are those of Qwen2.5-7B. What is timed is a recorded step of 28 layers, each with keys of
its own, as the cache of the processor must not hold them. ``bound`` is the time that reading the
keys and values once takes, by ``--bandwidth`` in GB/s, over what it took. What it finds goes into
``fusedgrpo/kernels/launch.py``: a run itself never searches. ``--quick`` tries two candidates on a
small case, on the CPU where there is no GPU (in torch, without launches), to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo import host
from fusedgrpo.kernels import decode_attention, launch
from fusedgrpo.models.decode_graphs import CudaGraphs
from fusedgrpo.models.kv_cache import PAGE, pages_of

HEADS, KV_HEADS, D, G = 28, 4, 128, 8
NOW = "as it is"


class Candidate(NamedTuple):
    split: int
    rows: int
    lanes: int
    block: int
    warps: int
    stages: int


class Case(NamedTuple):
    rows: int
    prompt: int
    own: int

    @classmethod
    def read(cls, text: str) -> Case:
        rows, rest = text.split("x")
        prompt, own = rest.split("+")
        return cls(int(rows), int(prompt), int(own))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="64x512+500,8x512+500,64x2048+1000")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--bandwidth", type=float, default=3350.0)
    parser.add_argument("--part", metavar="I/N", help="compile these candidates, for the cache")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    device = "cuda" if host.has_gpu() else "cpu"
    cases = [Case.read(text) for text in args.cases.split(",")]
    candidates = [
        Candidate(split, rows, lanes, block, warps, stages)
        for split, rows, lanes, (block, warps, stages) in itertools.product(
            (128, 256), (32, 64), (2,),
            [(32, 8, 3), (32, 4, 3), (32, 4, 4), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3),
             (128, 4, 1), (128, 8, 1), (128, 8, 2)],
        )
    ]  # fmt: skip
    if args.part:
        part, parts = map(int, args.part.split("/"))
        candidates, args.layers, cases = candidates[part::parts], 1, cases[:1]
    if args.quick:
        cases, candidates, args.layers = [Case(16, 40, 20)], candidates[:2], 2
    works = [make(case, args.layers, device) for case in cases]
    found: dict[Candidate | str, list[float]] = {NOW: [timed(work, device) for work in works]}
    for candidate in candidates:
        try:
            apply(candidate)
            found[candidate] = [timed(work, device) for work in works]
        except Exception as problem:  # noqa: BLE001 - too little shared memory, above all
            print(f"{candidate}: {str(problem).splitlines()[0][:90]}", file=sys.stderr)
            if device == "cuda":
                torch.cuda.synchronize()
    for index, case in enumerate(() if args.part else cases):
        layer = -(-case.rows // G) * case.prompt + case.rows * case.own
        least = args.layers * layer * KV_HEADS * D * 4 / args.bandwidth / 1e9
        print(f"\n{case}: ms of {args.layers} layers, share of the bound {1e3 * least:.3f} ms")
        best = sorted(found.items(), key=lambda item: item[1][index])[:12]
        for candidate, times in [*best, (NOW, found[NOW])]:
            print(f"  {1e3 * times[index]:8.3f}  {least / times[index]:6.2f}  {candidate}")
    if args.part:
        return
    print(f"\nby the sum of logarithms, relative to launch.py {NOW}:")
    for candidate, times in sorted(
        found.items(), key=lambda item: statistics.geometric_mean(item[1])
    )[:12]:
        ratio = statistics.geometric_mean(times) / statistics.geometric_mean(found[NOW])
        print(f"  {ratio:6.3f}  {candidate}")


def apply(candidate: Candidate) -> None:
    """The candidate's parameters, in every module of the kernels that has imported them."""
    chosen = launch.Launch(candidate.block, candidate.warps, candidate.stages)
    values: dict[str, Any] = {
        "DECODE_SPLIT": candidate.split,
        "DECODE_LANES": candidate.lanes,
        "decode_rows": lambda *_: candidate.rows,
        "decode_launch": lambda *_, **__: chosen,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("fusedgrpo.kernels"):
            for attribute, value in values.items():
                if hasattr(module, attribute):
                    setattr(module, attribute, value)


def make(case: Case, layers: int, device: str) -> Callable[[], list[Tensor]]:
    groups = -(-case.rows // G)
    prompt_pages, own_pages = pages_of(case.prompt), pages_of(case.own)
    pages = groups * prompt_pages + case.rows * own_pages
    dtype = torch.bfloat16
    query = torch.randn(case.rows, HEADS, D, device=device, dtype=dtype)
    kept = [
        torch.randn(2, pages, PAGE, KV_HEADS, D, device=device, dtype=dtype) for _ in range(layers)
    ]
    table = torch.arange(pages, device=device).int()
    first = groups * prompt_pages
    tables = (
        table[:first].view(groups, prompt_pages),
        torch.full((groups,), case.prompt, device=device).int(),
        (torch.arange(groups + 1, device=device) * G).clamp(max=case.rows).int(),
        table[first:].view(case.rows, own_pages),
        torch.full((case.rows,), case.own, device=device).int(),
    )
    return lambda: [decode_attention(query, *both, *tables) for both in kept]


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds, of a recorded step on a GPU; median of five."""
    work()
    if device == "cpu":
        return 1.0
    _, replay = CudaGraphs()(work)
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
