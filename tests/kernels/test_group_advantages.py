"""group_advantages against the loop that states TRL's arithmetic, and its exact properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import group_advantages
from fusedgrpo.kernels.reference import reference_group_advantages

SCALES = ["group", "batch", "none"]
AGGREGATIONS = ["sum_then_normalize", "normalize_then_sum"]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), F=st.integers(1, 3),
    seed=st.integers(0, 999), scale=st.sampled_from(SCALES), how=st.sampled_from(AGGREGATIONS),
    missing=st.sampled_from([0.0, 0.3]), shuffled=st.booleans(),
)  # fmt: skip
def test_ragged_groups_with_missing_rewards_equal_the_reference(
    sizes, F, seed, scale, how, missing, shuffled
):
    g = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 3, torch.tensor(sizes))
    if shuffled:
        ids = ids[torch.randperm(len(ids), generator=g)]
    rewards = torch.randn(len(ids), F, generator=g, dtype=torch.float64)
    rewards[torch.rand(rewards.shape, generator=g) < missing] = torch.nan
    weights = torch.rand(F, generator=g, dtype=torch.float64)
    options = {"weights": weights, "scale_rewards": scale, "multi_objective_aggregation": how}
    got = group_advantages(rewards, group_ids=ids, **options)
    want = reference_group_advantages(rewards, ids, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_the_formula_by_hand():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 5.0, 7.0])
    got = group_advantages(rewards, group_ids=torch.tensor([0, 0, 0, 0, 1, 1]))
    std_a, std_b = (1 / 3) ** 0.5, 2**0.5
    a, b = 0.5 / (std_a + 1e-4), 1 / (std_b + 1e-4)
    torch.testing.assert_close(got, torch.tensor([-a, a, a, -a, -b, b]))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e6])
def test_equal_rewards_give_exactly_zero(scale, value):
    """A mean of equal floats may round to a neighbour, and the advantage then is 1e-5."""
    rewards = torch.cat([torch.full((7,), value), torch.tensor([0.0, 1, 2, 3, 4, 5, 6])])
    advantages = group_advantages(rewards, group_size=7, scale_rewards=scale)
    assert torch.equal(advantages[:7], torch.zeros(7))
    assert (advantages[7:] != 0).any()


def test_unscorable_rows_get_zero_and_do_not_move_the_others():
    nan = torch.nan
    with_gap = group_advantages(torch.tensor([1.0, nan, 3.0, 5.0]), group_size=4)
    without = group_advantages(torch.tensor([1.0, 3.0, 5.0]), group_size=3)
    assert with_gap[1] == 0
    assert torch.equal(with_gap[[0, 2, 3]], without)
    assert torch.equal(group_advantages(torch.full((4,), nan), group_size=4), torch.zeros(4))
    assert torch.equal(group_advantages(torch.tensor([1.0, nan]), group_size=2), torch.zeros(2))


def test_one_missing_function_leaves_the_others_of_its_row():
    rewards = torch.tensor([[1.0, torch.nan], [0.0, 2.0]])
    got = group_advantages(rewards, group_size=2, scale_rewards="none")
    assert torch.equal(got, torch.tensor([-0.5, 0.5]))


def test_shift_and_permutation_leave_the_advantages_alone():
    rewards = torch.rand(12, dtype=torch.float64)
    base = group_advantages(rewards, group_size=4)
    torch.testing.assert_close(group_advantages(rewards + 8, group_size=4), base)
    order = torch.randperm(12)
    ids = torch.arange(12) // 4
    assert torch.allclose(group_advantages(rewards[order], group_ids=ids[order]), base[order])


def test_no_rewards_give_no_advantages():
    assert group_advantages(torch.zeros(0), group_ids=torch.zeros(0, dtype=torch.long)).shape == (
        0,
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"group_size": 3}, "group_size=3 does not divide the 4 rewards"),
        ({}, "either group_size or group_ids"),
        ({"group_size": 2, "group_ids": torch.zeros(4)}, "either group_size or group_ids"),
        ({"group_ids": torch.zeros(3)}, "group_ids has shape"),
        ({"group_size": 2, "weights": torch.ones(2)}, "weights has shape"),
        ({"group_size": 2, "scale_rewards": "std"}, "scale_rewards='std'"),
        (
            {"group_size": 2, "multi_objective_aggregation": "sum"},
            "multi_objective_aggregation='sum'",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.rand(4), **arguments)


def test_infinite_rewards_are_refused_by_row():
    with pytest.raises(ValueError, match=r"rewards\[2\] is infinite"):
        group_advantages(torch.tensor([0, 1, torch.inf, 2]), group_size=4)
