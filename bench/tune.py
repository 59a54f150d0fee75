"""Searches the launch parameters of ``linear_logprob`` on this GPU; the last lines are to paste.

    python bench/tune.py -N 32768 -H 3584 -V 152064 --mode frozen

First the tiling (rows and columns of a tile of logits) with the launch as it is, then block and
warps of the kernels over a tile, with the best tiling. Tilings whose scratch is over ``--scratch``
MiB are left out. What it finds goes into ``fusedgrpo/kernels/launch.py``: a run itself never
searches. ``--quick`` tries two tiny tilings on the CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch

from fusedgrpo import host
from fusedgrpo.kernels import launch, linear_logprob

ROWS = (1024, 2048, 4096, 8192)
COLUMNS = (4096, 8192, 16384, 32768)
BLOCKS = (1024, 2048, 4096, 8192, 16384)
WARPS = (4, 8, 16, 32)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-N", type=int, default=32768, help="tokens")
    parser.add_argument("-H", type=int, default=3584, help="hidden size")
    parser.add_argument("-V", type=int, default=152064, help="vocabulary")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--mode", choices=("no_grad", "frozen"), default="frozen")
    parser.add_argument("--scratch", type=int, default=500, help="MiB at most (default: 500)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny, on the CPU, tilings only")
    args = parser.parse_args()
    if args.quick:
        device, shape, dtype = "cpu", (64, 32, 1000), torch.float32
        sizes = [(32, 256), (64, 512)]
    elif not host.has_gpu():
        sys.exit("tune.py times kernels on a GPU, and there is none here (--quick: a dry run).")
    else:
        device, shape, dtype = "cuda", (args.N, args.H, args.V), DTYPES[args.dtype]
        sizes = list(itertools.product(ROWS, COLUMNS))
    _, H, V = shape
    work = make_work(*shape, dtype, device, args.mode)
    work()  # imports the kernels, whose modules hold the names to replace

    now = launch.tiling(H, V, dtype.itemsize, device)
    fitting = [s for s in sizes if scratch(*s, H, dtype.itemsize) <= args.scratch * 2**20]
    print(f"{len(sizes) - len(fitting)} of {len(sizes)} tilings need over {args.scratch} MiB")
    tilings = [now] + [dataclasses.replace(now, rows=r, columns=c) for r, c in fitting]
    timed = search(work, "tiling", list(dict.fromkeys(tilings)), device, args.rounds)
    best = timed[0][1]
    lines = [f"    return {best}  # tiling"]
    if device == "cuda":
        # block: no more than the tile has columns; a warp has at least 32 elements.
        launches = [launch.tile_launch(best.columns)] + [
            launch.Launch(block, warps)
            for block, warps in itertools.product(BLOCKS, WARPS)
            if block <= launch.power_of_two(best.columns) and warps * 32 <= block
        ]
        with replaced("tiling", best):
            timed = search(work, "tile_launch", list(dict.fromkeys(launches)), device, args.rounds)
        lines.append(f"    return {timed[0][1]}  # tile_launch")
    print(f"\nlaunch.py as it is: {now}, {launch.tile_launch(now.columns)}")
    print(f"best for {args.mode}, N={shape[0]}, H={H}, V={V}, {dtype}, {harness.machine()}:")
    print("\n".join(lines))


def make_work(
    N: int, H: int, V: int, dtype: torch.dtype, device: str, mode: str
) -> Callable[[], None]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, device=device, dtype=dtype).requires_grad_(mode == "frozen")
    weight = torch.randn(V, H, device=device, dtype=dtype).mul_(0.02)
    targets = torch.randint(V, (N,), device=device)
    ones = torch.ones(N, device=device)

    def work() -> None:
        hidden.grad = None
        logp = linear_logprob(hidden, weight, targets).logp
        if mode == "frozen":
            logp.backward(ones)

    return work


def scratch(rows: int, columns: int, H: int, itemsize: int) -> int:
    """Bytes: float32 logits and probabilities of a tile, two float32 accumulators ``[rows, H]``."""
    return rows * (columns * (4 + itemsize) + 8 * H)


def search(
    work: Callable[[], None], name: str, candidates: list[Any], device: str, rounds: int
) -> list[tuple[float, Any]]:
    """``(seconds, candidate)``, fastest first, printed."""

    def step(candidate: Any) -> Callable[[], dict[str, float]]:
        timed = harness.timed(work, device)

        def run() -> dict[str, float]:
            with replaced(name, candidate):
                return timed()

        return run

    steps = {str(candidate): step(candidate) for candidate in candidates}
    samples = harness.interleave(steps, rounds=rounds, warmup=1)
    medians = [(statistics.median(samples[str(c)]["time"]), c) for c in candidates]
    result = sorted(medians, key=lambda median: median[0])
    print(f"\n{name}, relative to the fastest" + (", ms" if device == "cuda" else ""))
    for seconds, candidate in result:
        milliseconds = f"  {1e3 * seconds:9.3f}" if device == "cuda" else ""
        print(f"  {seconds / result[0][0]:6.3f}{milliseconds}  {candidate}")
    return result


@contextlib.contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    """``fusedgrpo.kernels.launch.<name>`` gives ``value``, in every module that imported it."""
    original = getattr(launch, name)
    users = [
        module
        for module_name, module in sys.modules.items()
        if module_name.startswith("fusedgrpo.kernels") and getattr(module, name, None) is original
    ]
    for module in users:
        setattr(module, name, lambda *_: value)
    try:
        yield
    finally:
        for module in users:
            setattr(module, name, original)


if __name__ == "__main__":
    main()
