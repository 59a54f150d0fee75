"""From rewards to advantages: a function of a rollout's rewards, by name.

What it gives decides which completions are forwarded at all: an advantage of exactly 0 has, without
KL and entropy bonus, no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.errors import ConfigError, NonFiniteError, RewardError, brief
from fusedgrpo.kernels import group_advantages
from fusedgrpo.named_code import load_code, locate_code

# (rewards of B completions, group_ids [B], weights [F]) -> advantages [B]
Estimator = Callable[[RewardBatch, Tensor, Tensor], Tensor]


def group(config: GRPOConfig) -> Estimator:
    """Rewards less the mean of their group, divided as ``scale_rewards`` says (GRPO,
    arXiv 2402.03300; with ``scale_rewards: none``, Dr. GRPO's, arXiv 2503.20783)."""

    def estimate(rewards: RewardBatch, group_ids: Tensor, weights: Tensor) -> Tensor:
        return group_advantages(
            rewards.values,
            group_ids=group_ids,
            weights=weights,
            scale_rewards=config.scale_rewards,
            multi_objective_aggregation=config.multi_objective_aggregation,
        )

    return estimate


# Another one of ours: a function of the configuration here, a name in config/rules.py EXTENSIBLE.
ESTIMATORS: dict[str, Callable[[GRPOConfig], Estimator]] = {"group": group}


def find_estimator(config: GRPOConfig, folders: Sequence[Path]) -> Estimator:
    """The estimator that ``advantage_estimator`` names. Raises ConfigError."""
    name = config.advantage_estimator
    if name in ESTIMATORS:
        return ESTIMATORS[name](config)
    code = locate_code(name, folders, "advantage_estimator", ConfigError)
    assert code is not None  # config/rules.py
    return functools.partial(_checked, name, load_code(code, "advantage_estimator", ConfigError))


def _checked(
    name: str,
    function: Callable[..., object],
    rewards: RewardBatch,
    group_ids: Tensor,
    weights: Tensor,
) -> Tensor:
    """The advantages that the user's ``function`` returns, ``[B]`` float32. Raises RewardError for
    anything else, NonFiniteError for NaN and infinity."""
    who = f"advantage_estimator {name!r}"
    try:
        given = function(
            rewards=rewards.values.clone(),
            total=rewards.total.clone(),
            group_ids=group_ids.clone(),
            weights=weights.clone(),
        )
        found = torch.as_tensor(given, dtype=torch.float32).detach().cpu()
    except Exception as error:  # the user's code raises anything
        raise RewardError(f"{who} raised {type(error).__name__}: {error}") from error
    if found.shape != group_ids.shape:
        raise RewardError(
            f"{who} returned {brief(given)} of shape {tuple(found.shape)}: expected one advantage "
            f"for each of the {len(group_ids)} completions."
        )
    bad = ~found.isfinite()
    if bad.any():
        worst = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"{who} returned {found[worst].item()} for completion {worst}, whose rewards are "
            f"{rewards.values[worst].tolist()}. A completion that no function could judge gets 0."
        )
    return found
