"""Several runs beside each other: how they differ, in their options and on the same prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting.completions_log import prompt_text
from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.engine.reporting.held_out_log import Checks, set_of
from fusedgrpo.engine.reporting.judging.changes import bootstrapped
from fusedgrpo.engine.reporting.metrics_log import Row, finite, series
from fusedgrpo.engine.reporting.recorded_run import RecordedRun
from fusedgrpo.errors import DataError

# Options in which the runs of one series may differ, and whose differences say nothing.
PLACES = {"output_dir", "run_name", "logging_dir", "overwrite_output_dir", "resume_from_checkpoint"}
SEEDS = {"seed", "data_seed"}


@dataclass(frozen=True)
class Run:
    """name: the end of its path that tells it from the others. rows, config, checks, completions:
    its files."""

    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    checks: Checks
    completions: Completions


@dataclass(frozen=True)
class Difference:
    """The last answers of two runs to the same prompts: mean reward of the second less that of the
    first, with half of its interval. prompts: how many both had."""

    size: float
    margin: float
    prompts: int

    @property
    def is_sure(self) -> bool:
        return abs(self.size) > self.margin


@dataclass(frozen=True)
class Band:
    """A metric over the runs of one series, at the steps that all of them have. spread: the
    standard deviation over the runs; zeros for one run."""

    steps: list[int]
    mean: list[float]
    spread: list[float]


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises DataError for a folder without rows, or one that is named twice."""
    folders = [path.expanduser().resolve() for path in paths]
    for folder in folders:
        if folders.count(folder) > 1:
            raise DataError(f"{folder}: is named twice.")
    found = map(RecordedRun.read, folders)
    return [
        Run(name, run.rows, run.config, run.checks, run.completions)
        for name, run in zip(_names(folders), found, strict=True)
    ]


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Option -> its value in each run, of those that are not the same in all."""
    names = dict.fromkeys(name for run in runs for name in run.config if name not in PLACES)
    found = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(v != values[0] for v in values)}


def by_series(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in nothing but their seeds together, in order of appearance."""
    found: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        options = {k: v for k, v in run.config.items() if k not in PLACES | SEEDS}
        same = next((members for known, members in found if known == options and options), None)
        if same is None:
            found.append((options, [run]))
        else:
            same.append(run)
    return [members for _, members in found]


def band(runs: Sequence[Run], key: str, smooth: Any = None) -> Band | None:
    """None where no step has a value in all of the runs. smooth: applied to each run before."""
    curves = []
    for run in runs:
        steps, values = series(run.rows, key)
        values = smooth(values) if smooth is not None and values else values
        curves.append(dict(zip(steps, values, strict=True)))
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not shared:
        return None
    table = np.asarray([[curve[step] for step in shared] for curve in curves])
    spread = table.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(shared))
    return Band(shared, table.mean(axis=0).tolist(), spread.tolist())


def difference(first: Run, second: Run) -> Difference | None:
    """None where they have no two held-out prompts in common."""
    one, other = _last_rewards(first.checks), _last_rewards(second.checks)
    both = sorted(one.keys() & other.keys())
    if len(both) < 2:
        return None
    gained = np.asarray([other[key] - one[key] for key in both])
    return Difference(float(gained.mean()), bootstrapped(gained), len(both))


def _names(folders: Sequence[Path]) -> list[str]:
    if len(folders) == 1:
        return [folders[0].name]
    common = Path(os.path.commonpath(folders))
    return [str(folder.relative_to(common)) if folder != common else "." for folder in folders]


def _last_rewards(checks: Checks) -> dict[tuple[str, str], float]:
    """(set, prompt) -> reward, of the last check. Of a prompt that is there twice, the last."""
    records: Sequence[Mapping[str, Any]] = checks[max(checks)] if checks else []
    return {
        (set_of(record), prompt_text(record.get("prompt"))): value
        for record in records
        if (value := finite(record.get("reward"))) is not None
    }


def last_value(rows: Sequence[Row], key: str) -> float | None:
    """The last finite value of a metric."""
    values = series(rows, key)[1]
    return values[-1] if values else None
