"""Which groups of a rollout teach anything: those whose rewards differ.

DAPO (arXiv 2503.14476, section 3.2) samples until a batch is full of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.advantages import ESTIMATORS, Estimator
from fusedgrpo.engine.rewards import RewardBatch

# Differences up to this share of a group's greatest reward are rounding, not signal: a sum of a few
# float32 values is sure to a few of its last bits.
NOISE = 1e-6


class GroupSignal:
    """Asks of each group whether it has signal. weights: ``[F]``, of the reward functions."""

    def __init__(self, config: GRPOConfig, weights: Tensor, estimate: Estimator):
        self.by_part = config.multi_objective_aggregation == "normalize_then_sum"
        self.own_estimator = config.advantage_estimator not in ESTIMATORS
        self.weights = weights
        self.estimate = estimate

    def of_group(self, rewards: RewardBatch) -> bool:
        """Whether the completions of one group have signal.

        The total has to differ; where each part is normalised by itself, one that counts; where
        advantages are estimated by the user's function, they must not all be 0.
        """
        if self.own_estimator:
            alone = torch.zeros(len(rewards.total), dtype=torch.int64)
            return bool(self.estimate(rewards, alone, self.weights).any())
        if self.by_part:
            return any(differ(column) for column in rewards.values[:, self.weights != 0].T)
        return differ(rewards.total)


def differ(values: Tensor) -> bool:
    """Whether values, without NaN, differ by more than ``NOISE``."""
    known = values[~values.isnan()].double()
    if not len(known):
        return False
    return bool(known.max() - known.min() > NOISE * known.abs().max())
