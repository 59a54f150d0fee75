"""Looks at a run: arrays that a page or a plot draws as they are. Pure functions, numpy alone."""

from fusedgrpo.engine.reporting.looks.curves import (
    bounds_reached,
    clipping,
    gradient,
    kl_against_reward,
    memory_split,
    time_split,
)
from fusedgrpo.engine.reporting.looks.lengths import length_against_reward
from fusedgrpo.engine.reporting.looks.outcomes import prompt_outcomes
from fusedgrpo.engine.reporting.looks.rewards import group_signal, reward_histogram
from fusedgrpo.engine.reporting.looks.telling import telling_groups

__all__ = [
    "bounds_reached",
    "clipping",
    "gradient",
    "group_signal",
    "kl_against_reward",
    "length_against_reward",
    "memory_split",
    "prompt_outcomes",
    "reward_histogram",
    "telling_groups",
    "time_split",
]
