"""Scores of runs of known kinds, with their noise drawn from a seed."""

from __future__ import annotations

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores


def scores(reward, **columns) -> Scores:
    """Scores whose rewards are ``reward [rollouts, groups, completions]``; ``step``, ``row``,
    ``length`` or another column in place of what is usual (anything that broadcasts)."""
    reward = np.asarray(reward, dtype=float)
    rollouts, groups, _ = reward.shape

    def column(name, usual, dtype):
        found = np.asarray(columns.pop(name, usual), dtype=dtype)
        return np.broadcast_to(found, reward.shape).ravel()

    number = np.arange(groups)[None, :, None]
    found = Scores(
        step=column("step", 1 + np.arange(rollouts)[:, None, None], np.int64),
        group=column("group", number, np.int64),
        row=column("row", np.arange(rollouts)[:, None, None] * groups + number, np.int64),
        length=column("length", 100, np.int64),
        cut=column("cut", False, bool),
        reward=reward.ravel(),
        advantage=column("advantage", 0.0, float),
        parts=columns.pop("parts", {}),
    )
    assert not columns, columns
    return found


def learning(
    seed: int = 0,
    *,
    rollouts: int = 60,
    groups: int = 8,
    each: int = 8,
    prompts: int = 100,
    continuous: bool = False,
) -> Scores:
    """A run that learns: prompts of different difficulty, 0 or 1 (or that and noise), whose
    answers get longer, the right ones more so."""
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, prompts, (rollouts, groups, 1))
    ease = draw.normal(0, 2, prompts)[rows]
    time = np.linspace(-2, 2, rollouts)[:, None, None]
    right = draw.random((rollouts, groups, each)) < 1 / (1 + np.exp(-ease - time))
    length = 150 + 20 * time + 30 * right * (time > 0) + draw.normal(0, 20, right.shape)
    reward = right + draw.normal(0, 0.1, right.shape) * continuous
    return scores(reward, row=rows, length=length.astype(int))
