"""group_advantages against the loop that states TRL's arithmetic, and its exact properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgrpo.kernels import group_advantages
from fusedgrpo.kernels.backend import interpreted
from fusedgrpo.kernels.launch import Launch, group_launch
from fusedgrpo.kernels.reference import reference_group_advantages

SCALES = ["group", "batch", "none"]
AGGREGATIONS = ["sum_then_normalize", "normalize_then_sum"]

properties = settings(
    max_examples=20 if interpreted() else 150,
    deadline=None,
    # The kernel is the same for all examples.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def ragged_ids(sizes: list[int], shuffled: bool, g: torch.Generator) -> torch.Tensor:
    """Not dense, not sorted, and apart only beyond the 32 bits that a kernel might keep."""
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 2**33 - 3, torch.tensor(sizes))
    return ids[torch.randperm(len(ids), generator=g)] if shuffled else ids


@properties
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), F=st.integers(1, 3),
    seed=st.integers(0, 999), scale=st.sampled_from(SCALES), how=st.sampled_from(AGGREGATIONS),
    missing=st.sampled_from([0.0, 0.3, 0.7]), shuffled=st.booleans(),
)  # fmt: skip
def test_ragged_groups_with_missing_rewards_equal_the_reference(
    kernel, sizes, F, seed, scale, how, missing, shuffled
):
    """Rewards and weights of few bits: sums are exact, no deviation is tiny, many rewards equal."""
    g = torch.Generator().manual_seed(seed)
    ids = ragged_ids(sizes, shuffled, g)
    rewards = torch.randint(-4, 5, (len(ids), F), generator=g) / 4
    rewards[torch.rand(rewards.shape, generator=g) < missing] = torch.nan
    weights = torch.tensor([1.0, 0.5, 0.25])[:F]
    options = {"scale_rewards": scale, "multi_objective_aggregation": how}
    got = group_advantages(
        rewards.to(kernel.device), group_ids=ids, weights=weights, backend=kernel.backend, **options
    )
    want = reference_group_advantages(rewards.double(), ids, weights=weights, **options)
    assert got.dtype == torch.float32 and got.device.type == kernel.device.type
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), F=st.integers(1, 3),
    seed=st.integers(0, 999), scale=st.sampled_from(SCALES), how=st.sampled_from(AGGREGATIONS),
    missing=st.sampled_from([0.0, 0.3]), shuffled=st.booleans(),
)  # fmt: skip
def test_float64_rewards_are_computed_in_float64_by_torch(
    sizes, F, seed, scale, how, missing, shuffled
):
    g = torch.Generator().manual_seed(seed)
    ids = ragged_ids(sizes, shuffled, g)
    rewards = torch.randn(len(ids), F, generator=g, dtype=torch.float64)
    rewards[torch.rand(rewards.shape, generator=g) < missing] = torch.nan
    weights = torch.rand(F, generator=g, dtype=torch.float64)
    options = {"weights": weights, "scale_rewards": scale, "multi_objective_aggregation": how}
    got = group_advantages(rewards, group_ids=ids, backend="torch", **options)
    want = reference_group_advantages(rewards, ids, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_rewards_of_any_dtype_give_float32(kernel, dtype):
    rewards = torch.tensor([0, 1, 1, 0], dtype=dtype, device=kernel.device)
    got = group_advantages(rewards, group_size=4, backend=kernel.backend)
    want = group_advantages(rewards.float(), group_size=4, backend=kernel.backend)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_groups_larger_than_a_block_equal_the_reference(kernel, monkeypatch, scale, how):
    """Members in every block of the loop, the last one cut off, and a group inside one block."""
    if kernel.backend == "triton":
        from fusedgrpo.kernels.advantage import advantages_triton

        monkeypatch.setattr(advantages_triton, "group_launch", lambda: Launch(4, num_warps=1))
    nan = torch.nan
    rewards = torch.tensor(
        [[1, nan], [0, 3], [nan, 2], [1, 1], [5, 1], [nan, nan], [2, 0], [0, 4], [1, 2], [3, 3]]
    )
    ids = torch.tensor([1, 1, 0, 1, 0, 1, 0, 1, 7, 7])
    options = {"scale_rewards": scale, "multi_objective_aggregation": how}
    got = group_advantages(
        rewards.to(kernel.device), group_ids=ids, backend=kernel.backend, **options
    )
    want = reference_group_advantages(rewards.double(), ids, **options)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_more_rewards_than_a_block_takes(kernel):
    B = group_launch().block + 3
    rewards = torch.rand(B, device=kernel.device)
    ids = torch.arange(B) % 2
    got = group_advantages(rewards, group_ids=ids, backend=kernel.backend)
    want = reference_group_advantages(rewards.cpu().double(), ids)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "how,scale",
    [(AGGREGATIONS[0], "group"), (AGGREGATIONS[0], "batch"), (AGGREGATIONS[1], "group")],
)
@pytest.mark.parametrize("B,group_size", [(6, 1), (6, 2), (6, 6), (1, 1)])
def test_a_group_size_stands_for_ids_in_order(kernel, B, group_size, how, scale):
    rewards = torch.rand(B, 2, device=kernel.device)
    options = {
        "multi_objective_aggregation": how,
        "scale_rewards": scale,
        "backend": kernel.backend,
    }
    by_size = group_advantages(rewards, group_size=group_size, **options)
    by_ids = group_advantages(rewards, group_ids=torch.arange(B) // group_size, **options)
    torch.testing.assert_close(by_size, by_ids, rtol=1e-5, atol=1e-6)
    if group_size == 1 and how == "sum_then_normalize":
        assert torch.equal(by_size, torch.zeros_like(by_size))


def test_the_formula_by_hand(kernel):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 5.0, 7.0], device=kernel.device)
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    got = group_advantages(rewards, group_ids=ids, backend=kernel.backend)
    std_a, std_b = (1 / 3) ** 0.5, 2**0.5
    a, b = 0.5 / (std_a + 1e-4), 1 / (std_b + 1e-4)
    torch.testing.assert_close(got.cpu(), torch.tensor([-a, a, a, -a, -b, b]))


def test_eps_is_added_to_the_deviation(kernel):
    rewards = torch.tensor([0.0, 2.0], device=kernel.device)
    got = group_advantages(rewards, group_size=2, eps=1.0, backend=kernel.backend)
    a = 1 / (2**0.5 + 1)
    torch.testing.assert_close(got.cpu(), torch.tensor([-a, a]))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e6])
def test_equal_rewards_give_exactly_zero(kernel, scale, value):
    """A mean of equal floats may round to a neighbour, and the advantage then is 1e-5."""
    rewards = torch.cat([torch.full((7,), value), torch.tensor([0.0, 1, 2, 3, 4, 5, 6])])
    advantages = group_advantages(
        rewards.to(kernel.device), group_size=7, scale_rewards=scale, backend=kernel.backend
    ).cpu()
    assert torch.equal(advantages[:7], torch.zeros(7))
    assert (advantages[7:] != 0).any()


@pytest.mark.parametrize("scale", SCALES)
def test_unscorable_rows_get_zero_and_do_not_move_the_others(kernel, scale):
    def advantages(rewards: list[float]) -> torch.Tensor:
        return group_advantages(
            torch.tensor(rewards, device=kernel.device),
            group_size=len(rewards),
            scale_rewards=scale,
            backend=kernel.backend,
        )

    nan = torch.nan
    with_gap = advantages([1.0, nan, 3.0, 5.0])
    assert with_gap[1] == 0
    assert torch.equal(with_gap[[0, 2, 3]], advantages([1.0, 3.0, 5.0]))
    assert not advantages([nan] * 4).any()
    assert not advantages([1.0, nan]).any()


def test_one_missing_function_leaves_the_others_of_its_row(kernel):
    rewards = torch.tensor([[1.0, torch.nan], [0.0, 2.0]], device=kernel.device)
    got = group_advantages(rewards, group_size=2, scale_rewards="none", backend=kernel.backend)
    assert torch.equal(got.cpu(), torch.tensor([-0.5, 0.5]))


def test_a_reward_without_another_to_compare_with_keeps_its_row_in_the_batch(kernel):
    """normalize_then_sum: the reward of row 0 says nothing; row 3 has none and is left out."""
    nan = torch.nan
    rewards = torch.tensor([[nan, 5.0], [0.0, nan], [1.0, nan], [nan, nan]], device=kernel.device)
    got = group_advantages(
        rewards,
        group_size=4,
        multi_objective_aggregation="normalize_then_sum",
        backend=kernel.backend,
    ).cpu()
    z = 0.5 / (0.5**0.5 + 1e-4)
    a = z / (z + 1e-4)  # the deviation of 0, -z and z is z
    torch.testing.assert_close(got, torch.tensor([0.0, -a, a, 0.0]))


def test_shift_and_permutation_leave_the_advantages_alone(kernel):
    rewards = torch.rand(12, device=kernel.device)
    base = group_advantages(rewards, group_size=4, backend=kernel.backend)
    shifted = group_advantages(rewards + 8, group_size=4, backend=kernel.backend)
    torch.testing.assert_close(shifted, base, rtol=1e-4, atol=1e-4)
    order = torch.randperm(12)
    ids = torch.arange(12) // 4
    permuted = group_advantages(rewards[order], group_ids=ids[order], backend=kernel.backend)
    torch.testing.assert_close(permuted, base[order], rtol=1e-5, atol=1e-6)


def test_strided_rewards_and_weights(kernel):
    rewards = torch.rand(3, 8, device=kernel.device).T[::2]
    weights = torch.tensor([1.0, 9.0, 2.0, 9.0, 0.5], device=kernel.device)[::2]
    ids = torch.tensor([5, 0, 5, 0, 1, 0, 5, 0])[::2]
    got = group_advantages(rewards, group_ids=ids, weights=weights, backend=kernel.backend)
    want = reference_group_advantages(
        rewards.cpu().double(), ids, weights=weights.cpu(), scale_rewards="group"
    )
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 2), (3, 0)])
def test_no_rewards_give_no_advantages(kernel, shape):
    rewards = torch.zeros(shape, device=kernel.device)
    ids = torch.zeros(shape[0], dtype=torch.long)
    got = group_advantages(rewards, group_ids=ids, backend=kernel.backend)
    assert torch.equal(got.cpu(), torch.zeros(shape[0]))


def test_the_result_carries_no_gradient(kernel):
    rewards = torch.rand(4, device=kernel.device, requires_grad=True)
    assert not group_advantages(rewards, group_size=2, backend=kernel.backend).requires_grad


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_operator_keeps_the_rules_of_torch(kernel, how):
    rewards = torch.rand(6, 2, device=kernel.device)
    weights = torch.ones(2, device=kernel.device)
    ids = torch.tensor([3, 3, 0, 0, 0, 3], device=kernel.device)
    for group_ids, group_size in ((ids, 0), (None, 3)):
        torch.library.opcheck(
            torch.ops.fusedgrpo.group_advantages,
            (rewards, weights, group_ids, group_size, "batch", how, 1e-4, kernel.backend),
        )


@pytest.mark.parametrize("grouping", ["group_size", "group_ids"])
def test_it_compiles_without_a_graph_break(kernel, grouping):
    def advantages(rewards: torch.Tensor, group: int | torch.Tensor) -> torch.Tensor:
        return group_advantages(rewards * 2, **{grouping: group}, backend=kernel.backend) + 1

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    rewards = torch.rand(6, device=kernel.device)
    group = 3 if grouping == "group_size" else torch.arange(6, device=kernel.device) // 3
    assert torch.equal(compiled(rewards, group), advantages(rewards, group))
    with pytest.raises(ValueError, match=r"rewards\[1\] is infinite"):
        compiled(rewards.index_fill(0, torch.tensor([1], device=kernel.device), torch.inf), group)


def test_auto_compiles_too():
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    rewards = torch.rand(6)
    assert torch.equal(
        compiled(rewards, group_size=3), group_advantages(rewards, group_size=3, backend="torch")
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"group_size": 3}, "group_size=3 does not divide the 4 rewards"),
        ({}, "either group_size or group_ids"),
        ({"group_size": 2, "group_ids": torch.zeros(4)}, "either group_size or group_ids"),
        ({"group_ids": torch.zeros(3)}, "group_ids has shape"),
        ({"group_ids": torch.zeros(4)}, "group_ids has dtype torch.float32"),
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


def test_infinite_rewards_are_refused_by_row(kernel):
    rewards = torch.tensor([0, 1, torch.inf, 2], device=kernel.device)
    with pytest.raises(ValueError, match=r"rewards\[2\] is infinite"):
        group_advantages(rewards, group_size=4, backend=kernel.backend)
