"""Rows of runs of known kinds, with their noise drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

STEPS = 120
Shape = Callable[[float], float]  # of the share of the run that is over


def rise(a: float, b: float, until: float = 0.7) -> Shape:
    return lambda t: a + (b - a) * min(t / until, 1.0)


def flat(a: float) -> Shape:
    return lambda t: a


def up_and_down(a: float, top: float, b: float, at: float = 0.5) -> Shape:
    return lambda t: a + (top - a) * t / at if t < at else top + (b - top) * (t - at) / (1 - at)


def run(
    seed: int,
    rewards: dict[str, Shape] | Shape,
    *,
    held_out: dict[str, Shape] | Shape | None = None,
    steps: int = STEPS,
    noise: float = 0.06,
    evaluations: int = 7,
    entropy: Shape | None = None,
    length: Shape | None = None,
    kl: Shape | None = None,
    clipped: Shape | None = None,
    silent: Shape | None = None,
    grad_norm: Shape | None = None,
    skipped: tuple[int, ...] = (),
    evaluated_noise: float = 0.015,
) -> list[dict[str, Any]]:
    """Rows as a run writes them; of several rewards the sum is ``reward``."""
    draw = np.random.default_rng(seed)
    parts = rewards if isinstance(rewards, dict) else {"accuracy": rewards}
    kept = held_out if isinstance(held_out, dict) or held_out is None else {"accuracy": held_out}
    due = {round(i * steps / (evaluations - 1)) for i in range(evaluations)} if kept else set()
    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        t = step / steps
        row: dict[str, Any] = {"step": step}
        if kept is not None and step in due:
            found = {n: shape(t) + draw.normal(0, evaluated_noise) for n, shape in kept.items()}
            row |= {f"eval_rewards/{name}/mean": value for name, value in found.items()}
            row |= {"eval_reward": sum(found.values()), "eval_reward_std": 0.4}
        if step:
            found = {n: shape(t) + draw.normal(0, noise) for n, shape in parts.items()}
            row |= {f"rewards/{name}/mean": value for name, value in found.items()}
            row |= {
                "reward": sum(found.values()),
                "reward_std": 0.3,
                "time/sample": 1.0,
                "loss": draw.normal(0, 0.02),
                "grad_norm": math.nan if step in skipped else _of(grad_norm, t, 0.4, draw),
                "skipped_update": step in skipped,
                "entropy": _of(entropy, t, 0.8, draw),
                "completions/mean_length": _of(length, t, 100.0, draw),
                "completions/clipped_ratio": min(_of(clipped, t, 0.03, draw), 1.0),
                "frac_reward_zero_std": min(_of(silent, t, 0.3, draw), 1.0),
            }
            if kl is not None:
                row["kl"] = _of(kl, t, 0.0, draw)
        if len(row) > 1:
            rows.append(row)
    return rows


def _of(shape: Shape | None, t: float, usual: float, draw: np.random.Generator) -> float:
    value = usual if shape is None else shape(t)
    return float(value * (1 + draw.normal(0, 0.03)))
