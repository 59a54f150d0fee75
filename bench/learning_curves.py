"""What the rows of bench_learning.py say: a table, and the curves with bands over seeds as a PNG.

    python bench/learning_curves.py learning.jsonl --figure learning.png

Accuracy is that of answers drawn as in training. A curve of a kind is the mean over its seeds,
between looks as if it rose evenly; its band is from the least to the greatest. The target of a task
is what the mean of ``off`` has reached after nine tenths of its processor time, so that another
kind may be a tenth slower and still be seen to reach it. A line of the table has the time at which
the mean of a kind first is there, its ratio to that of ``off``, and accuracy before and after.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

SHARE = 0.9  # of the time of off
COLORS = {"off": "C0", "dynamic": "C1", "informative": "C2", "both": "C3", "trl": "0.4"}

Curves = dict[str, dict[str, list[list[list[Any]]]]]  # [task][kind]: the looks of each seed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    curves = read(args.rows)
    for task, kinds in curves.items():
        print(table(task, kinds))
    if args.figure is not None:
        draw(curves, args.figure)


def read(file: Path) -> Curves:
    """Raises ValueError where a task was run with more than one setting."""
    curves: Curves = {}
    cases: dict[str, str] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        task = row["case"].partition(",")[0]
        if cases.setdefault(task, row["case"]) != row["case"]:
            raise ValueError(f"{file}: {cases[task]!r} and {row['case']!r} are not one curve")
        curves.setdefault(task, {}).setdefault(row["impl"], []).append(row["value"]["looks"])
    return curves


def grid(runs: list[list[list[Any]]], points: int = 201) -> np.ndarray:
    """Processor times ``[points]``, from 0 to where the shortest run ends."""
    return np.linspace(0.0, min(looks[-1][1] for looks in runs), points)


def along(runs: list[list[list[Any]]], seconds: np.ndarray) -> np.ndarray:
    """Accuracy ``[runs, points]`` at these times."""
    return np.array(
        [np.interp(seconds, [x[1] for x in looks], [x[2] for x in looks]) for looks in runs]
    )


def reached(seconds: np.ndarray, mean: np.ndarray, target: float) -> float:
    """When ``mean`` first is ``target``; infinite if it never is."""
    there = np.flatnonzero(mean >= target)
    if not len(there):
        return float("inf")
    i = int(there[0])
    if i == 0 or mean[i] == mean[i - 1]:
        return float(seconds[i])
    share = (target - mean[i - 1]) / (mean[i] - mean[i - 1])
    return float(seconds[i - 1] + share * (seconds[i] - seconds[i - 1]))


def target_of(kinds: dict[str, list[list[list[Any]]]]) -> float:
    """NaN without runs of ``off``."""
    if "off" not in kinds:
        return float("nan")
    seconds = grid(kinds["off"])
    mean = along(kinds["off"], seconds).mean(0)
    return float(np.interp(SHARE * seconds[-1], seconds, mean))


def table(task: str, kinds: dict[str, list[list[list[Any]]]]) -> str:
    target = target_of(kinds)
    lines = [f"{task}: target {target:.3f}"]
    off = None
    for kind, runs in kinds.items():
        seconds = grid(runs)
        curves = along(runs, seconds)
        time = reached(seconds, curves.mean(0), target)
        off = time if kind == "off" else off
        when = f"{time:.0f} s" if time < float("inf") else f"not in {seconds[-1]:.0f} s"
        ratio = f"{time / off:.2f} of off" if off else ""
        ends = " ".join(f"{end:.3f}" for end in sorted(curves[:, -1]))
        lines.append(
            f"  {kind:<12} {when:<14} {ratio:<12} {runs[0][0][2]:.3f} to {ends} in "
            f"{seconds[-1]:.0f} s; {of_groups(runs)}"
        )
    return "\n".join(lines)


def of_groups(runs: list[list[list[Any]]]) -> str:
    """What the mean run did, to its end: most likely answers, steps, groups."""
    ends = [looks[-1] for looks in runs]
    step, seconds, _, likely, groups = (statistics.fmean(end[i] for end in ends) for i in range(5))
    said = (
        f"most likely answers {runs[0][0][3]:.3f} to {likely:.3f}; {step:.0f} steps, "
        f"{groups:.0f} groups"
    )
    if any(end[5] is None for end in ends):
        return said
    signal = statistics.fmean(end[5] for end in ends)
    each = f", {seconds / signal:.1f} s for each of these" if signal else ""
    return f"{said}, {signal / groups:.0%} with signal{each}"


def draw(curves: Curves, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(4.2 * len(curves), 3.6), squeeze=False, layout="constrained"
    )
    for axis, (task, kinds) in zip(axes[0], curves.items(), strict=True):
        for kind, runs in kinds.items():
            seconds = grid(runs)
            each = along(runs, seconds)
            color = COLORS[kind]
            label = f"{kind} ({len(runs)} seed{'s' * (len(runs) > 1)})"
            axis.plot(seconds, each.mean(0), color=color, label=label)
            axis.fill_between(seconds, each.min(0), each.max(0), color=color, alpha=0.12, lw=0)
        axis.axhline(target_of(kinds), color="k", lw=0.6, ls=":")
        axis.set_title(task)
        axis.set_xlabel("processor time (s)")
        axis.set_ylabel("held-out accuracy, answers drawn")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
