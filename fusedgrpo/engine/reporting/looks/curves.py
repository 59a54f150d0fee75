"""Looks at the rows of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting.metrics_log import Row, finite, series
from fusedgrpo.engine.reporting.smoothing import far_out, most_of, smooth

PHASES = ("sample", "score", "update")
CLIP_FRACTIONS = ("clip_ratio/", "cispo_clip_ratio")


def trace(rows: Iterable[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps ``[S]`` int64 and values ``[S]`` of the rows that have ``key``; NaN where it is null or
    no finite number, so that a gap is one. Both are empty where no value is a number."""
    points = [(int(row["step"]), finite(row[key])) for row in rows if key in row]
    steps = np.asarray([step for step, _ in points], dtype=np.int64)
    values = np.asarray([np.nan if v is None else v for _, v in points], dtype=float)
    return (steps, values) if np.isfinite(values).any() else (steps[:0], values[:0])


@dataclass(frozen=True)
class Trajectory:
    """steps: ``[S]``, those that have both. kl: ``[S]`` nats a token, as logged. reward, smooth_kl:
    ``[S]``, means of their neighbourhood (``smooth``) without values that are far out; NaN where
    there are no others."""

    steps: np.ndarray
    kl: np.ndarray
    reward: np.ndarray
    smooth_kl: np.ndarray


def kl_against_reward(rows: Sequence[Row]) -> Trajectory:
    """The way of the run through KL and reward: what the distance from the reference bought."""
    kl, reward = _column(rows, "kl"), _column(rows, "reward")
    both = np.isfinite(kl) & np.isfinite(reward)
    steps = np.asarray([row["step"] for row in rows], dtype=np.int64)
    return Trajectory(
        steps=steps[both],
        kl=kl[both],
        reward=_mean_of_most(reward[both]),
        smooth_kl=_mean_of_most(kl[both]),
    )


def _mean_of_most(values: np.ndarray) -> np.ndarray:
    if not len(values):
        return values
    return np.asarray(smooth(values, left_out=far_out(values, *most_of(values))))


@dataclass(frozen=True)
class Clipping:
    """steps: ``[S]``. fractions: by the metric's name (``clip_ratio/...``, ``cispo_clip_ratio``)
    ``[S]``, of the tokens, or of the completions at the level of sequences; NaN where a step has
    none. Names without a number are left out."""

    steps: np.ndarray
    fractions: dict[str, np.ndarray]


def clipping(rows: Sequence[Row]) -> Clipping:
    """How much of what was trained on was held back by the loss."""
    names = list(dict.fromkeys(k for row in rows for k in row if k.startswith(CLIP_FRACTIONS)))
    named = [row for row in rows if any(name in row for name in names)]
    fractions = {name: _column(named, name) for name in names}
    return Clipping(
        steps=np.asarray([row["step"] for row in named], dtype=np.int64),
        fractions={name: each for name, each in fractions.items() if np.isfinite(each).any()},
    )


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    found = (finite(row.get(key)) for row in rows)
    return np.asarray([np.nan if value is None else value for value in found], dtype=float)


@dataclass(frozen=True)
class Gradient:
    """steps: ``[S]``. norm: ``[S]`` before clipping, NaN where it was not finite. limit:
    ``max_grad_norm``, None where nothing is clipped or it is not known. share_clipped: of the
    steps with a norm, how many were above the limit; None without one."""

    steps: np.ndarray
    norm: np.ndarray
    limit: float | None
    share_clipped: float | None


def gradient(rows: Sequence[Row], config: Mapping[str, Any] | None) -> Gradient:
    """The gradient's norm and what ``config``, the options of the run, clips it to."""
    steps, norm = trace(rows, "grad_norm")
    limit = finite((config or {}).get("max_grad_norm")) or None
    known = norm[np.isfinite(norm)]
    clipped = None if limit is None or not len(known) else float((known > limit).mean())
    return Gradient(steps, norm, limit, clipped)


@dataclass(frozen=True)
class TimeSplit:
    """phases: the P that were timed, in the order of a step. seconds, shares: ``[P]`` of the run;
    the shares add up to 1, or are 0 where no time passed."""

    phases: tuple[str, ...]
    seconds: np.ndarray
    shares: np.ndarray


def time_split(rows: Sequence[Row]) -> TimeSplit:
    """Where the time of all steps went."""
    found = {phase: series(rows, f"time/{phase}")[1] for phase in PHASES}
    phases = tuple(phase for phase, values in found.items() if values)
    seconds = np.asarray([sum(found[phase]) for phase in phases], dtype=float)
    return TimeSplit(phases, seconds, seconds / (seconds.sum() or 1.0))


def bounds_reached(rows: Sequence[Row]) -> dict[str, float]:
    """The share of the bound of each phase that has one (on a known GPU), over all steps with it
    together."""
    found = {}
    for phase in PHASES:
        pairs = [(finite(r.get(f"roofline/{phase}")), finite(r.get(f"time/{phase}"))) for r in rows]
        known = [(share, time) for share, time in pairs if share is not None and time]
        if known:
            found[phase] = sum(s * t for s, t in known) / sum(t for _, t in known)
    return found


@dataclass(frozen=True)
class MemorySplit:
    """Bytes. phases: those that were measured by themselves (on a GPU). peaks: ``[P]``, the
    greatest of each. peak: of all, None if it was never measured; without a GPU it is the process's
    memory so far. planned: the plan's peak, None without a plan. of_plan: peak / planned, None
    without a plan or where the peak is not that of a GPU. retries: how often work was done again in
    smaller parts for lack of memory."""

    phases: tuple[str, ...]
    peaks: np.ndarray
    peak: float | None
    planned: float | None
    of_plan: float | None
    retries: int


def memory_split(rows: Sequence[Row]) -> MemorySplit:
    """The plan against what was measured."""
    found = {phase: series(rows, f"memory/{phase}")[1] for phase in PHASES}
    phases = tuple(phase for phase, values in found.items() if values)
    peak = max(series(rows, "memory/peak")[1], default=None)
    planned = max(series(rows, "memory/planned")[1], default=None)
    return MemorySplit(
        phases=phases,
        peaks=np.asarray([max(found[phase]) for phase in phases], dtype=float),
        peak=peak,
        planned=planned,
        of_plan=peak / planned if phases and peak is not None and planned else None,
        retries=int(sum(series(rows, "memory/retries")[1])),
    )
