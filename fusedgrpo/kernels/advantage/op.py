"""Group advantages: rewards normalised within the completions of one prompt.

    A[i] = (r[i] - mean_group(r)) / (std_group(r) + eps)

with the unbiased standard deviation, NaN meaning "this function does not apply to this row".
Arithmetic of TRL 1.16's ``GRPOTrainer`` (Shao et al., 2024, arXiv 2402.03300), for groups that may
differ in size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.custom_op import plain_arithmetic_on

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]


def group_advantages(
    rewards: Tensor,
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,
    weights: Tensor | None = None,
    scale_rewards: ScaleRewards = "group",
    multi_objective_aggregation: Aggregation = "sum_then_normalize",
    eps: float = 1e-4,
    backend: Backend = "auto",
) -> Tensor:
    """Advantages ``[B]`` float32 of rewards ``[B]`` or ``[B, F]`` (F reward functions).

    Give either ``group_size`` (B is a multiple of it, groups in order) or ``group_ids`` ``[B]``
    int64 (any values, groups of any size, in any order). ``weights`` is ``[F]``, all 1 if left out.

    ``scale_rewards`` divides by the standard deviation of the ``"group"``, of the whole
    ``"batch"``, or not (``"none"``; Dr. GRPO, arXiv 2503.20783). ``"sum_then_normalize"``
    normalises the weighted sum of the functions; ``"normalize_then_sum"`` normalises each function
    within its group, then the weighted sum within the batch, and ignores ``scale_rewards`` (GDPO,
    arXiv 2601.05242).

    A row whose rewards are all NaN is left out of every mean and gets 0, and so does a row that has
    no other to compare with. Rewards that are equal throughout a group give exactly 0 there.
    The result carries no gradient. float64 rewards are computed in float64 by the torch backend,
    all else in float32. Raises ValueError for shapes or options that do not fit and for infinite
    rewards.
    """
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: expected [B] or [B, F].")
    if (group_size is None) == (group_ids is None):
        raise ValueError("Give either group_size or group_ids.")
    rewards_BF = rewards[:, None] if rewards.dim() == 1 else rewards
    B, F = rewards_BF.shape
    if group_size is not None and (group_size < 1 or B % group_size):
        raise ValueError(
            f"group_size={group_size} does not divide the {B} rewards: "
            "for groups of different sizes give group_ids."
        )
    if group_ids is not None:
        if group_ids.shape != (B,):
            raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}: expected ({B},).")
        if group_ids.is_floating_point():
            raise ValueError(f"group_ids has dtype {group_ids.dtype}: expected torch.int64.")
        group_ids = group_ids.to(rewards.device)
    if weights is not None and weights.shape != (F,):
        raise ValueError(f"weights has shape {tuple(weights.shape)}: expected ({F},).")
    if scale_rewards not in ("group", "batch", "none"):
        raise ValueError(f"scale_rewards={scale_rewards!r}: expected 'group', 'batch' or 'none'.")
    if multi_objective_aggregation not in ("sum_then_normalize", "normalize_then_sum"):
        raise ValueError(
            f"multi_objective_aggregation={multi_objective_aggregation!r}: "
            "expected 'sum_then_normalize' or 'normalize_then_sum'."
        )
    if rewards.dtype != torch.float64:
        rewards_BF = rewards_BF.float()
    weights_F = rewards_BF.new_ones(F) if weights is None else weights.to(rewards_BF)
    return torch.ops.fusedgrpo.group_advantages(
        rewards_BF.detach(),
        weights_F.detach(),
        group_ids,
        0 if group_size is None else group_size,
        scale_rewards,
        multi_objective_aggregation,
        eps,
        backend,
    )


@torch.library.custom_op("fusedgrpo::group_advantages", mutates_args=())
def _group_advantages(
    rewards: Tensor,
    weights: Tensor,
    group_ids: Tensor | None,
    group_size: int,
    scale_rewards: str,
    aggregation: str,
    eps: float,
    backend: str,
) -> Tensor:
    """rewards ``[B, F]`` and weights ``[F]`` are both float32 or both float64.

    group_size: read if there are no group_ids.
    """
    B, F = rewards.shape
    if rewards.isinf().any():
        row = int(rewards.isinf().any(1).nonzero()[0])
        raise ValueError(f"rewards[{row}] is infinite: rewards must be finite, or NaN for 'none'.")
    if B == 0 or F == 0:
        return torch.zeros(B, dtype=torch.float32, device=rewards.device)
    if resolve_backend(backend, "group_advantages", rewards.device) == "triton":
        from fusedgrpo.kernels.advantage.advantages_triton import group_advantages_triton

        with plain_arithmetic_on(rewards):
            return group_advantages_triton(
                rewards, weights, group_ids, group_size, scale_rewards, aggregation, eps
            )
    if group_ids is None:
        group_ids = torch.arange(B, device=rewards.device) // group_size
    return group_advantages_torch(rewards, weights, group_ids, scale_rewards, aggregation, eps)


@_group_advantages.register_fake
def _(rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape[0], dtype=torch.float32)


def group_advantages_torch(
    rewards_BF: Tensor,
    weights_F: Tensor,
    group_ids: Tensor,
    scale_rewards: str,
    aggregation: str,
    eps: float,
) -> Tensor:
    """The torch reference of the Triton kernel, in the dtype of the rewards."""
    group_B = group_ids.unique(return_inverse=True)[1]
    everyone_B = torch.zeros_like(group_B)
    unscorable_B = rewards_BF.isnan().all(1)
    if aggregation == "sum_then_normalize":
        total_B1 = _weighted_sum(rewards_BF, weights_F, unscorable_B)
        advantages_B1 = _centred(total_B1, group_B)
        if scale_rewards != "none":
            scope_B = group_B if scale_rewards == "group" else everyone_B
            advantages_B1 = advantages_B1 / (_std(total_B1, scope_B) + eps)
    else:
        z_BF = _centred(rewards_BF, group_B) / (_std(rewards_BF, group_B) + eps)
        total_B1 = _weighted_sum(z_BF, weights_F, unscorable_B)
        advantages_B1 = _centred(total_B1, everyone_B) / (_std(total_B1, everyone_B) + eps)
    return advantages_B1[:, 0].nan_to_num(nan=0.0).float()


def _weighted_sum(x_BF: Tensor, weights_F: Tensor, unscorable_B: Tensor) -> Tensor:
    """``[B, 1]``, NaN where ``unscorable_B``."""
    return (weights_F * x_BF).nansum(1).masked_fill(unscorable_B, torch.nan)[:, None]


def _group_sum(x_BF: Tensor, group_B: Tensor) -> Tensor:
    """``[B, F]``: the sum over each row's group, broadcast back to the rows."""
    sums = x_BF.new_zeros(int(group_B.max()) + 1, x_BF.shape[1]).index_add_(0, group_B, x_BF)
    return sums[group_B]


def _centred(x_BF: Tensor, group_B: Tensor) -> Tensor:
    """``x - mean`` of each group over what is not NaN; exactly 0 where all are equal."""
    present = ~x_BF.isnan()
    count = _group_sum(present.to(x_BF), group_B)
    mean = _group_sum(x_BF.nan_to_num(nan=0.0), group_B) / count
    # The mean of equal numbers may round to a neighbour of theirs; eps would not hide that.
    high, low = (_group_extreme(x_BF, group_B, how) for how in ("amax", "amin"))
    return torch.where((high == low) & present, 0.0, x_BF - mean)


def _std(x_BF: Tensor, group_B: Tensor) -> Tensor:
    """Unbiased standard deviation of each group; NaN with one value left, 0 for a group of one."""
    count = _group_sum((~x_BF.isnan()).to(x_BF), group_B)
    squares = _group_sum(_centred(x_BF, group_B).square().nan_to_num(nan=0.0), group_B)
    std = (squares / (count - 1)).sqrt()
    std = torch.where(count > 1, std, torch.nan)
    size = _group_sum(torch.ones_like(x_BF), group_B)
    return torch.where(size == 1, 0.0, std)


def _group_extreme(x_BF: Tensor, group_B: Tensor, how: str) -> Tensor:
    filler = -torch.inf if how == "amax" else torch.inf
    x_BF = torch.where(x_BF.isnan(), filler, x_BF)
    out = x_BF.new_full((int(group_B.max()) + 1, x_BF.shape[1]), filler)
    rows = group_B[:, None].expand_as(x_BF)
    return out.scatter_reduce(0, rows, x_BF, how)[group_B]
