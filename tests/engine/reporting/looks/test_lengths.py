from __future__ import annotations

import numpy as np
import pytest

from fusedgrpo.engine.reporting.looks import length_against_reward
from tests.helpers.synthetic_scores import learning, scores

NAN = np.nan


def test_the_first_fifth_is_compared_with_the_last():
    reward = np.arange(40.0).reshape(10, 1, 4)
    found = length_against_reward(scores(reward, length=100 - reward))
    assert (found.early.first, found.early.last) == (1, 2)
    assert (found.late.first, found.late.last) == (9, 10)
    assert found.early.reward.tolist() == list(range(8))
    assert found.late.length.tolist() == [100 - r for r in range(32, 40)]
    assert found.late.correlation == pytest.approx(-1)


def test_points_are_thinned_evenly_and_the_correlation_is_of_all():
    run = learning(rollouts=50, groups=10, each=10, continuous=True)
    found = length_against_reward(run)
    assert found.late.count == 1000 and len(found.late.length) == len(found.late.reward) == 400
    last = run.step > 40
    expected = np.corrcoef(run.length[last], run.reward[last])[0, 1]
    assert found.late.correlation == pytest.approx(expected)
    assert found.late.correlation > 0.3 > abs(found.early.correlation)
    assert found.late.reward[[0, -1]].tolist() == run.reward[last][[0, -1]].tolist()


def test_lengths_above_and_below_the_mean_of_the_group():
    reward = [[[0, 1, 1, NAN], [0.3, 0.3, 0.3, 0.3]], [[0.5, 0.5, 0, 1], [1, 1, 1, 1]]]
    length = [[[10, 20, 40, 999], [7, 7, 7, 7]], [[9, 9, 50, 60], [7, 7, 7, 7]]]
    found = length_against_reward(scores(reward, length=length))
    assert found.above.tolist() == [30, 60]
    assert found.below.tolist() == [10, 50]


def test_equal_rewards_are_neither_above_nor_below_the_mean_that_rounding_makes_of_them():
    reward = np.full((4, 3, 7), 0.1)
    found = length_against_reward(scores(reward))
    assert np.isnan(found.above).all() and np.isnan(found.below).all()
    assert found.early.correlation is None and found.late.correlation is None


@pytest.mark.parametrize("reward", [np.zeros((0, 0, 0)), np.full((3, 2, 2), NAN)])
def test_without_rewards_there_is_nothing_to_see(reward):
    found = length_against_reward(scores(reward))
    assert found.early is None and found.late is None


def test_one_rollout_is_not_compared_with_itself():
    found = length_against_reward(scores([[[0, 1]]]))
    assert found.early.count == 2 and found.late is None
