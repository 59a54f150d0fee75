"""sapo: a sigmoid in place of the clip, steeper where the advantage is not positive.

    L = -4/T sigmoid(x) A,   x = T (r - 1),   T = sapo_temperature_pos or _neg by the sign of A

    dL/dr = -4 sigmoid(x) sigmoid(-x) A,  which is -A at r = 1

Paper: arXiv 2511.20347.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.loss.choose import choose
from fusedgrpo.kernels.loss.types import TokenTerms
from fusedgrpo.loss_options import LossOptions


def token_terms(
    ratio: Tensor, advantage: Tensor, logp: Tensor, weight: Tensor, options: LossOptions
) -> TokenTerms:
    t = choose(advantage > 0, options.sapo_temperature_pos, options.sapo_temperature_neg, ratio)
    x = t * (ratio - 1)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return TokenTerms(
        value=-torch.sigmoid(x) * 4 / t * advantage,
        by_ratio=-4 * torch.sigmoid(x) * torch.sigmoid(-x) * advantage,
        by_logp=torch.zeros_like(ratio),
        low=never,
        high=never,
    )
