"""The clipped surrogate: grpo, bnpo, dr_grpo, dapo and luspo, which differ in what they divide by.

    L = -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A)

    dL/dr = -A, or 0 where the side that is the minimum is cut

At a tie of the minimum each side counts half, and a clip passes the gradient at its bounds, as in
torch's autograd.

Papers: Schulman et al. 2017 (PPO, arXiv 1707.06347), the clip itself; grpo 2402.03300, dapo with
its epsilon_high 2503.14476, dr_grpo 2503.20783, luspo 2602.05261; delta 2505.07291 (INTELLECT-2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.loss.types import TokenTerms
from fusedgrpo.loss_options import LossOptions


def token_terms(
    ratio: Tensor, advantage: Tensor, logp: Tensor, weight: Tensor, options: LossOptions
) -> TokenTerms:
    lower, upper = 1 - options.epsilon, 1 + options.upper
    capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
    a, b = capped * advantage, ratio.clamp(lower, upper) * advantage
    a_counts = torch.where(a == b, 0.5, (a < b).to(ratio.dtype))
    b_counts = 1 - a_counts
    if options.delta is not None:
        a_counts = torch.where(ratio > options.delta, 0.0, a_counts)
    b_counts = torch.where((ratio < lower) | (ratio > upper), 0.0, b_counts)
    return TokenTerms(
        value=-torch.minimum(a, b),
        by_ratio=-advantage * (a_counts + b_counts),
        by_logp=torch.zeros_like(ratio),
        low=(capped < lower) & (advantage < 0),
        high=(capped > upper) & (advantage > 0),
    )
