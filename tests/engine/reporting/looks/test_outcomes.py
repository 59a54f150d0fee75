from __future__ import annotations

import numpy as np
import pytest

from fusedgrpo.engine.reporting.judging.prompts import ORDER, compared, counts
from fusedgrpo.engine.reporting.looks import prompt_outcomes
from tests.helpers.synthetic_scores import learning, scores

NAN = np.nan
# Two rollouts of the same prompts, each with two answers.
BEFORE = {"solved": [1, 1], "newly solved": [0, 1], "lost": [1, 1], "never": [0, 0],
          "same": [0, 1], "better": [0, 0], "worse": [0, 1]}  # fmt: skip
AFTER = {"solved": [1, 1], "newly solved": [1, 1], "lost": [1, 0], "never": [0, 0],
         "same": [1, 0], "better": [1, 0], "worse": [0, 0]}  # fmt: skip


def test_each_outcome_is_counted_and_what_changed_is_told_by_row():
    rows = np.arange(7)[None, :, None]
    found = prompt_outcomes(scores([list(BEFORE.values()), list(AFTER.values())], row=rows))
    assert found.prompts == 7 and found.half == 3 and found.top == 1
    assert found.counts == dict.fromkeys(ORDER, 1) and list(found.counts) == list(ORDER)
    names = list(BEFORE)
    assert [names[one.row] for one in found.changed] == ["lost", "worse", "newly solved", "better"]
    assert all(names[one.row] == one.status for one in found.changed)
    lost = found.changed[0]
    assert (lost.first, lost.last, lost.before, lost.after) == (1, 2, 1, 0.5)


def test_held_out_prompts_are_sorted_by_the_same_definitions():
    rewards = [(0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5), (0.2, 0.5), (0.5, 0.2), (-1, -1)]
    before, after = ([pair[i] for pair in rewards] for i in (0, 1))
    rows = np.arange(len(rewards))[None, :, None]
    trained = prompt_outcomes(scores(np.asarray([before, after])[:, :, None], row=rows))
    checks = {
        step: [{"row": row, "reward": pair[i]} for row, pair in enumerate(rewards)]
        for i, step in enumerate((0, 9))
    }
    held_out = compared(checks)
    assert trained.counts == counts(held_out)
    expected = [(one.status, one.after["row"]) for one in held_out if one.gained]
    assert [(one.status, one.row) for one in trained.changed] == expected


def test_a_prompt_is_met_twice_in_two_rollouts_and_not_in_two_groups_of_one():
    found = prompt_outcomes(scores([[[0, 0], [1, 1]]], row=[[[5], [5]]]))
    assert found.prompts == 0 and found.counts == {} and found.changed == ()
    found = prompt_outcomes(
        scores([[[0, 0], [1, 1]], [[1, 1], [1, 1]]], row=[[[5], [5]], [[5], [6]]])
    )
    assert [(one.row, one.before, one.after) for one in found.changed] == [(5, 0.5, 1)]


def test_the_times_between_do_not_matter_nor_those_without_a_reward():
    rewards = [[[NAN]], [[0]], [[1]], [[0]], [[NAN]]]
    found = prompt_outcomes(scores(rewards, row=3))
    assert found.counts == {"never": 1} and found.changed == ()


def test_a_group_of_equal_rewards_is_solved_whatever_its_mean_rounds_to():
    found = prompt_outcomes(scores(np.full((2, 1, 7), 0.1), row=0))
    assert found.counts == {"solved": 1}


@pytest.mark.parametrize("reward", [np.zeros((0, 0, 0)), np.full((3, 2, 2), NAN)])
def test_without_rewards_nothing_became_of_any(reward):
    found = prompt_outcomes(scores(reward, row=1))
    assert (found.prompts, found.counts, found.changed, found.top) == (0, {}, (), None)


def test_a_run_that_learns_solves_more_than_it_loses():
    found = prompt_outcomes(learning(rollouts=100))
    assert found.counts["newly solved"] > found.counts.get("lost", 0)
    assert sum(found.counts.values()) == found.prompts > 90
