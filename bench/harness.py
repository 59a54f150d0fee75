"""What every ``bench_*.py`` shares: arguments, workers, interleaved rounds, the gate, the results.

A bench is a script in this folder. It names its contenders, of which ``fusedgrpo`` is ours, lets
``gate`` compare their answers, and only then times them, one after the other in every round
(A B A B ...), so that whatever else the machine does hits all alike. What counts is the ratio of
medians. Each figure is one JSON line with the keys of ``ROW_KEYS``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedgrpo import host

OURS = "fusedgrpo"
ROW_KEYS = ("bench", "case", "impl", "metric", "value", "unit", "machine", "versions", "commit")
DISTRIBUTIONS = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes")

Samples = dict[str, dict[str, list[float]]]  # [contender][metric]: one value per round


def parser(description: str | None, peers: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments that all benches have; a bench may add its own."""

    def names(text: str) -> list[str]:
        given = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in given if name not in peers]:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)}: this bench knows {', '.join(peers) or 'no peers'}"
            )
        return given

    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="a tiny case, to see that it works")
    result.add_argument(
        "--peers",
        type=names,
        default=[],
        metavar="NAME,...",
        help=f"compare with these, if they are installed ({', '.join(peers) or 'none known'})",
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON lines")
    return result


def installed(peers: Sequence[str]) -> list[str]:
    """Those of ``peers`` that can be imported; the others are named and left out."""
    present = [name for name in peers if importlib.util.find_spec(name) is not None]
    for name in peers:
        if name not in present:
            print(f"{name}: not installed, skipped")
    return present


class Turns:
    """A worker's end of the line: it waits for a request and answers it, over and over."""

    def __init__(self, connection: Any):
        self._connection = connection

    def wait(self) -> Any:
        return self._connection.recv()

    def answer(self, value: Any) -> None:
        self._connection.send(("answer", value))


class Worker:
    """``target(turns, *args)`` in a fresh process, for contenders that must not share one.

    Its own process is what makes peak memory on a CPU mean something, and keeps patches, thread
    settings and allocator state to itself. target: a function of the script that runs. log: gets
    all that the process prints.
    """

    def __init__(self, name: str, log: Path, target: Callable[..., None], *args: Any):
        self.name = name
        self.log = log
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_run, args=(theirs, str(log), target, args), daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, request: Any) -> Any:
        """The answer. Raises RuntimeError with the traceback if the worker failed or died."""
        # A worker that failed on its way here has left its error and hung up.
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(request)
        try:
            kind, value = self._connection.recv()
        except (ConnectionResetError, EOFError):
            raise self._died() from None
        if kind == "error":
            raise RuntimeError(f"{self.name} failed:\n{value}")
        return value

    def close(self) -> None:
        """End it without asking: it has nothing to save, and a polite trainer would save it."""
        self._process.kill()
        self._process.join()

    def _died(self) -> RuntimeError:
        tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-20:])
        return RuntimeError(f"{self.name} ended without an answer. It last printed:\n{tail}")


def _run(connection: Any, log: str, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        target(Turns(connection), *args)
    except EOFError:
        pass  # the bench is gone
    except BaseException:  # noqa: BLE001 - reported on the other side of the pipe
        connection.send(("error", traceback.format_exc()))


def interleave(
    steps: Mapping[str, Callable[[], Mapping[str, float]]], *, rounds: int, warmup: int
) -> Samples:
    """Run all ``steps`` in turn, ``warmup`` rounds for nothing and then ``rounds`` that count.

    A step does the work once and returns its figures by metric.
    """
    samples: Samples = {name: {} for name in steps}
    # Steps collect garbage; what the imports made is none, and looking at it takes longer than many
    # a step.
    gc.collect()
    gc.freeze()
    for index in range(warmup + rounds):
        done = f"round {index - warmup + 1} of {rounds}" if index >= warmup else "warm-up"
        print(done, file=sys.stderr, flush=True)
        for name, step in steps.items():
            figures = step()
            if index >= warmup:
                for metric, value in figures.items():
                    samples[name].setdefault(metric, []).append(float(value))
    gc.unfreeze()
    return samples


def timed(
    work: Callable[[], Any], device: str = "cpu", repeat: int = 1
) -> Callable[[], dict[str, float]]:
    """``work`` as a step of ``interleave`` in this process: its ``time`` in seconds.

    On CUDA by the device's events, and also ``peak_memory``, bytes allocated beyond what was
    before. On a CPU the resident set belongs to the whole process: use a ``Worker`` and
    ``PeakMemory`` there. repeat: runs of ``work`` per step, for work that is over in microseconds.
    """
    import torch

    def on_cpu() -> dict[str, float]:
        gc.collect()
        started = time.perf_counter()
        for _ in range(repeat):
            work()
        return {"time": (time.perf_counter() - started) / repeat}

    def on_cuda() -> dict[str, float]:
        gc.collect()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin.record()
        for _ in range(repeat):
            work()
        end.record()
        end.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return {"time": begin.elapsed_time(end) / 1e3 / repeat, "peak_memory": peak}

    return on_cuda if torch.device(device).type == "cuda" else on_cpu


class PeakMemory:
    """The high-water mark of this process' resident set, from ``reset`` on. Linux with glibc only.

    ``reset`` returns what the allocator keeps of freed memory, which otherwise hides the work's own
    peak. Getting it back costs time: do not time the work that is measured.
    """

    @staticmethod
    def reset() -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def bytes() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/self/status has no VmHWM")


def gate(errors: Mapping[str, Mapping[str, float]], tolerance: float) -> None:
    """Show how far each contender is from the truth; exit with 1 if one is not within tolerance."""
    print(f"gate: relative error against the reference, at most {tolerance:g}")
    failed = []
    for name, values in errors.items():
        print(
            f"  {name:<12}  " + "  ".join(f"{what} {error:.1e}" for what, error in values.items())
        )
        # Not "error > tolerance": NaN has to fail.
        failed += [f"{name}: {what}" for what, e in values.items() if not e <= tolerance]
    if failed:
        print(f"gate: FAILED, nothing was timed: {'; '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


def report(
    bench: str,
    case: str,
    samples: Samples,
    units: Mapping[str, str],
    *,
    json_file: Path | None = None,
    distributions: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Print the table; return the rows, and write them to ``json_file`` if there is one.

    units: by metric, in the order of the table. distributions: more packages to give versions of.
    """
    where = about(distributions)
    rows = [
        {"bench": bench, "case": case, "impl": impl, "metric": metric, "value": value, "unit": unit}
        | where
        for impl, metric, value, unit in figures(samples, units)
    ]
    print(f"\n{bench}: {case}\n{where['machine']}; commit {where['commit']}")
    print(", ".join(f"{name} {version}" for name, version in where["versions"].items()))
    print(table(samples, units))
    if json_file is not None:
        write(rows, json_file)
    return rows


def about(distributions: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a row that say where it comes from."""
    return {
        "machine": machine(),
        "versions": versions((*DISTRIBUTIONS, *distributions)),
        "commit": COMMIT,
    }


def write(rows: Sequence[Mapping[str, Any]], json_file: Path) -> None:
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def figures(samples: Samples, units: Mapping[str, str]) -> list[tuple[str, str, float, str]]:
    """``(contender, metric, value, unit)``. The metric itself is the median over the rounds;
    ``/min``, ``/max`` and ``/round`` (each round, in order) come where rounds differ, ``/ratio``
    is a peer's median over ours."""
    result = []
    for impl, metrics in samples.items():
        for metric, unit in units.items():
            if not (values := metrics.get(metric)):
                continue
            median = statistics.median(values)
            result.append((impl, metric, median, unit))
            if min(values) < max(values):
                result.append((impl, f"{metric}/min", min(values), unit))
                result.append((impl, f"{metric}/max", max(values), unit))
                result += [(impl, f"{metric}/round", value, unit) for value in values]
            if (ratio := _ratio(samples, impl, metric)) is not None:
                result.append((impl, f"{metric}/ratio", ratio, f"x {OURS}"))
    return result


def table(samples: Samples, units: Mapping[str, str]) -> str:
    """For people: one line per metric and contender, median [min - max] and the ratio to ours."""
    lines = [("metric", "impl", "median", "min", "max", "unit", f"x {OURS}")]
    for metric, unit in units.items():
        scale, shown = SHOWN.get(unit, (1, unit))
        for impl, metrics in samples.items():
            if not (values := metrics.get(metric)):
                continue
            numbers = (statistics.median(values), min(values), max(values))
            ratio = _ratio(samples, impl, metric)
            lines.append(
                (
                    metric,
                    impl,
                    *(f"{number / scale:,.4g}" for number in numbers),
                    shown,
                    "" if ratio is None else f"{ratio:.2f}",
                )
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 1, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


SHOWN = {"byte": (2**20, "MiB"), "FLOP": (1e9, "GFLOP")}


def _ratio(samples: Samples, impl: str, metric: str) -> float | None:
    ours = samples.get(OURS, {}).get(metric)
    if impl == OURS or not ours or not statistics.median(ours):
        return None
    return statistics.median(samples[impl][metric]) / statistics.median(ours)


def machine() -> str:
    """The hardware in words: no host name, no path."""
    parts = [host.cpu_name(), f"{host.cores()} cores", f"{_memory_gib()} GiB"]
    if "torch" in sys.modules and host.has_gpu():
        _, total = host.gpu_memory(0)
        parts.append(f"{host.gpu_name(0)} {math.ceil(total / 2**30)} GiB")
    return ", ".join(parts)


def _memory_gib() -> int:
    return round(host.memory() / 2**30)


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Of Python and of those distributions that are installed."""
    result = {"python": platform.python_version()}
    for name in distributions:
        if version := host.package_version(name):
            result[name] = version
    return result


def commit() -> str:
    """The commit that is measured, ``+changes`` if tracked files differ from it."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# When the bench started: somebody may commit while it runs.
COMMIT = commit()
