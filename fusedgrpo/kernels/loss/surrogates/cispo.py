"""cispo: the ratio is a weight with a cap, and no token loses its gradient to the cap.

    L = -stop(c) A logp,   c = min(r, epsilon_high)

    dL/dlogp = -c A, nothing through r

``epsilon_high`` is the cap itself, without the ``1 +`` of the clip.

Paper: MiniMax-M1, arXiv 2506.13585.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.loss.types import TokenTerms
from fusedgrpo.loss_options import LossOptions


def token_terms(
    ratio: Tensor, advantage: Tensor, logp: Tensor, weight: Tensor, options: LossOptions
) -> TokenTerms:
    by_logp = -ratio.clamp(max=options.upper) * advantage
    return TokenTerms(
        value=by_logp * logp,
        by_ratio=torch.zeros_like(ratio),
        by_logp=by_logp,
        low=torch.zeros_like(ratio, dtype=torch.bool),
        high=(ratio > options.upper) & (advantage > 0),
    )
