from __future__ import annotations

import numpy as np
import pytest
import torch

from fusedgrpo.engine.reporting.completions_reader import scores_from
from fusedgrpo.engine.reporting.looks import group_signal, reward_histogram
from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.engine.rollout.metrics import reward_metrics
from tests.helpers.synthetic_scores import learning, scores

NAN = np.nan


def test_rewards_of_few_values_have_a_bin_each():
    found = reward_histogram(scores([[[0, 1, 1, NAN]], [[0, 0, 0.5, 0]]]))
    assert found.values.tolist() == [0, 0.5, 1]
    assert found.edges.tolist() == [-0.25, 0.25, 0.75, 1.25]
    assert found.counts.tolist() == [[1, 3], [0, 1], [2, 0]]
    assert found.shares[:, 0].tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert found.unscored.tolist() == [1, 0]
    assert (found.least, found.greatest) == (0, 1)


@pytest.mark.parametrize("different, few", [(12, True), (13, False)])
def test_from_thirteen_values_on_bins_are_of_equal_width(different, few):
    found = reward_histogram(scores(np.arange(different).reshape(1, 1, -1)), bins=4)
    assert (found.values is not None) == few
    assert found.counts.sum() == different
    if not few:
        assert found.edges.tolist() == [0, 3, 6, 9, 12]
        assert found.counts[:, 0].tolist() == [3, 3, 3, 4]  # the greatest is in the last one


def test_what_rounding_makes_of_one_value_is_one_value():
    found = reward_histogram(scores([[[0.1 + 0.2, 0.3, 0.1 * 3, 1e-17, 0]]]))
    assert found.values.tolist() == pytest.approx([0, 0.3])
    assert found.counts[:, 0].tolist() == [2, 3]


def test_one_reward_that_is_far_out_does_not_take_the_bins_of_the_others():
    rewards = np.linspace(0, 1, 999)
    found = reward_histogram(scores(np.append(rewards, -5000).reshape(10, 10, 10)))
    assert found.edges[0] > -0.1 and found.edges[-1] < 1.1
    assert found.counts.sum() == 1000 and found.least == -5000
    assert found.counts.sum(axis=1).min() > 30


def test_columns_are_ranges_of_rollouts_and_lose_none():
    step = np.asarray([1, 5, 9, 13, 17])[:, None, None]
    found = reward_histogram(scores(np.ones((5, 2, 3)), step=step), columns=2)
    assert found.time.first.tolist() == [1, 13]
    assert found.time.last.tolist() == [9, 17]
    assert found.time.edges.tolist() == [1, 13, 21]  # the last rollout is used as long as others
    assert found.counts.tolist() == [[18, 12]]
    many = reward_histogram(learning(rollouts=61), columns=60)
    assert len(many.time) == 60 and many.counts.sum() == 61 * 64
    assert np.diff(many.time.edges).min() > 0


def test_groups_are_solved_divided_or_the_same():
    rewards = [
        [[1, 1], [0, 1], [0, 0], [NAN, NAN]],
        [[1, NAN], [0.5, 0.5], [0, NAN], [1, 0]],
    ]
    found = group_signal(scores(rewards))
    assert found.solved.tolist() == [0.25, 0.25]
    assert found.divided.tolist() == [0.25, 0.25]
    assert found.same.tolist() == [0.25, 0.5]
    assert found.unscored.tolist() == [0.25, 0]
    assert found.groups.tolist() == [4, 4] and found.top == 1


def test_nothing_is_solved_where_no_reward_is_above_0():
    found = group_signal(scores(np.full((3, 2, 4), -1.0)))
    assert found.top is None and not found.solved.any() and (found.same == 1).all()


def test_the_share_without_signal_is_that_of_the_metric():
    """Also where float64 sees differences that float32, in which rewards are added up, does not."""
    draw = np.random.default_rng(0)
    rewards = draw.choice([0.3, 0.1 + 0.2, 1 / 3, 0.7], size=(1, 50, 2)).astype(np.float32)
    rewards[0, ::7] = NAN
    total = torch.from_numpy(rewards.ravel())
    batch = RewardBatch(
        values=total[:, None], total=total, seconds={}, extra={}, metrics={}, dropped=0
    )
    ids = torch.arange(50).repeat_interleave(2)
    row = reward_metrics(["f"], batch, ids, "group")
    records = [
        {"step": 1, "group": int(group), "row": 0, "reward": value}
        for group, value in zip(ids, total.tolist(), strict=True)
    ]
    found = group_signal(scores_from(records))
    share = float(found.solved[0] + found.same[0])
    assert share == pytest.approx(row["frac_reward_zero_std"])
    noise = scores(np.asarray([[[0.3, 0.1 + 0.2]]]))
    assert group_signal(noise).divided.tolist() == [0]


def test_groups_are_counted_in_any_order_of_their_completions():
    rewards = [[[0, 1], [1, 1]]]
    shuffled = scores(np.asarray([[[0, 1], [1, 1]]]), group=[[[0, 1], [0, 1]]])
    assert group_signal(scores(rewards)).divided.tolist() == [0.5]
    assert group_signal(shuffled).divided.tolist() == [0.5]
    assert group_signal(shuffled).solved.tolist() == [0.5]


@pytest.mark.parametrize(
    "reward",
    [
        np.zeros((0, 0, 0)),
        np.full((3, 2, 2), NAN),
        np.full((3, 2, 2), 0.7),
        np.ones((1, 1, 1)),
        np.arange(6.0).reshape(6, 1, 1),
    ],
)
def test_shares_add_up_whatever_the_run(reward):
    with np.errstate(all="raise"):
        signal = group_signal(scores(reward))
        histogram = reward_histogram(scores(reward))
    total = signal.solved + signal.divided + signal.same + signal.unscored
    assert total.tolist() == [1] * len(signal.time)
    assert histogram.counts.sum() == np.isfinite(reward).sum()
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.counts.sum() + histogram.unscored.sum() == reward.size
