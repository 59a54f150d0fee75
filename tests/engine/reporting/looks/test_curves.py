from __future__ import annotations

import math

import numpy as np
import pytest

from fusedgrpo.engine.reporting.looks import (
    bounds_reached,
    clipping,
    gradient,
    kl_against_reward,
    memory_split,
    time_split,
)
from fusedgrpo.engine.reporting.looks.curves import trace
from fusedgrpo.engine.reporting.smoothing import far_out, most_of, smooth, window_of


def test_a_null_is_a_gap_and_a_row_without_the_key_is_none():
    rows = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": None}, {"step": 3}, {"step": 4, "kl": 1}]
    steps, values = trace(rows, "kl")
    assert steps.tolist() == [1, 2, 4] and np.isnan(values).tolist() == [False, True, False]
    assert len(trace([{"step": 1, "kl": None}], "kl")[0]) == 0


def test_the_trajectory_has_the_steps_that_have_both():
    rows = [{"step": i, "kl": i / 10, "reward": float(i)} for i in range(6)]
    rows[2]["kl"] = None
    del rows[4]["reward"]
    found = kl_against_reward(rows)
    assert found.steps.tolist() == [0, 1, 3, 5]
    assert found.kl.tolist() == [0, 0.1, 0.3, 0.5]
    assert found.reward.tolist() == pytest.approx([0.5, 4 / 3, 3, 4])
    assert found.smooth_kl.tolist() == pytest.approx([0.05, 0.4 / 3, 0.3, 0.4])
    assert len(kl_against_reward([]).steps) == 0


def test_clip_fractions_are_those_that_the_rows_have():
    rows = [
        {"step": 1, "clip_ratio/low_mean": 0.1, "clip_ratio/high_max": None, "loss": 0},
        {"step": 2, "loss": 0},
        {"step": 3, "clip_ratio/low_mean": None, "cispo_clip_ratio": 0.5},
        {"step": 4, "clip_ratio/low_mean": 0.2},
    ]
    found = clipping(rows)
    assert found.steps.tolist() == [1, 3, 4]
    assert set(found.fractions) == {"clip_ratio/low_mean", "cispo_clip_ratio"}
    low = found.fractions["clip_ratio/low_mean"]
    assert low[[0, 2]].tolist() == [0.1, 0.2] and math.isnan(low[1])


def test_steps_above_the_limit_were_clipped():
    rows = [{"step": i, "grad_norm": norm} for i, norm in enumerate([0.5, 1.0, 1.5, None, 3])]
    found = gradient(rows, {"max_grad_norm": 1.0})
    assert found.limit == 1 and found.share_clipped == 0.5
    assert np.isnan(found.norm).tolist() == [False, False, False, True, False]
    for config in ({"max_grad_norm": 0}, {}, None):  # 0: never
        assert gradient(rows, config).limit is gradient(rows, config).share_clipped is None
    assert gradient([{"step": 1}], {"max_grad_norm": 1.0}).share_clipped is None


def test_the_time_is_split_over_the_phases_that_were_timed():
    rows = [{"step": i, "time/sample": 3.0, "time/update": 1.0} for i in range(4)]
    rows[0]["time/sample"] = None
    found = time_split(rows)
    assert found.phases == ("sample", "update")
    assert found.seconds.tolist() == [9, 4]
    assert found.shares.tolist() == pytest.approx([9 / 13, 4 / 13])
    assert time_split([{"step": 1}]).phases == ()
    assert time_split([{"step": 1, "time/score": 0.0}]).shares.tolist() == [0]


def test_the_share_of_the_bound_is_that_of_all_steps_together():
    rows = [
        {"step": 1, "time/sample": 3.0, "roofline/sample": 0.5, "time/update": 1.0},
        {"step": 2, "time/sample": 1.0, "roofline/sample": 0.1, "time/update": 0.0},
        {"step": 3, "time/sample": 5.0, "time/update": 1.0, "roofline/update": None},
    ]
    assert bounds_reached(rows) == pytest.approx({"sample": (0.5 * 3 + 0.1 * 1) / 4})
    assert bounds_reached([{"step": 1}]) == {}


def test_the_plan_is_compared_with_the_greatest_peak():
    rows = [
        {"step": 1, "memory/peak": 60, "memory/sample": 60, "memory/update": 40,
         "memory/planned": 100, "memory/retries": 2},
        {"step": 2, "memory/peak": 80, "memory/sample": 50, "memory/update": 80,
         "memory/planned": 100},
    ]  # fmt: skip
    found = memory_split(rows)
    assert found.phases == ("sample", "update") and found.peaks.tolist() == [60, 80]
    assert (found.peak, found.planned, found.of_plan, found.retries) == (80, 100, 0.8, 2)
    bare = memory_split([{"step": 1, "memory/peak": 7}])
    assert (bare.phases, bare.peak, bare.planned, bare.of_plan) == ((), 7, None, None)
    named = memory_split([{"step": 1, "memory/peak": 7, "memory/planned": 100}])  # on a CPU
    assert named.of_plan is None
    assert memory_split([{"step": 1}]).peak is None


def test_smoothing_keeps_a_constant_and_halves_no_edge():
    assert smooth([2.0] * 7) == pytest.approx([2.0] * 7)
    assert smooth([0.0, 3.0, 6.0]) == pytest.approx([1.5, 3.0, 4.5])
    assert smooth([5.0]) == [5.0] and smooth([]) == []


def test_smoothing_leaves_gaps_and_counts_them_in_no_mean():
    found = smooth([1.0, math.nan, 3.0, 5.0])
    assert found[0] == 1 and math.isnan(found[1]) and found[2:] == pytest.approx([4, 4])
    assert all(map(math.isnan, smooth([math.nan] * 3)))


def test_what_is_left_out_counts_in_no_mean_and_makes_no_gap():
    left_out = np.asarray([False, True, False, False])
    assert smooth([1.0, 900.0, 3.0, 5.0], left_out=left_out) == pytest.approx([1, 2, 4, 4])


def test_few_values_that_are_far_from_most_are_far_out():
    values = np.asarray([*np.linspace(0, 1, 30), 100, math.nan])
    low, high = most_of(values)
    assert 0 <= low < 0.1 and 0.9 < high <= 1
    assert np.flatnonzero(far_out(values, low, high)).tolist() == [30]
    assert most_of(np.linspace(0, 1, 30)) == (0, 1)
    assert most_of(np.asarray([1.0, 900.0])) == (1, 900)  # of two, none is the odd one
    rows = [{"step": i, "kl": 900.0 if i == 9 else i / 100, "reward": 1.0} for i in range(30)]
    assert kl_against_reward(rows).smooth_kl.max() < 0.3


def test_a_huge_value_takes_no_digits_of_those_after_it():
    assert smooth([1e20, *[0.1] * 50])[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("count, window", [(1, 3), (40, 5), (120, 13), (10_000, 1001)])
def test_the_window_is_what_the_legend_says(count, window):
    assert window_of(count) == window
    values = np.zeros(3 * window)
    values[window + window // 2] = 1
    assert np.count_nonzero(smooth(values, window)) == window
