"""vespo: one weight per completion, of its importance weight w, which holds the sampler's too.

    L = -stop(phi(w)) A logp,   phi(w) = w^k exp(lambda (1 - w)),   phi(1) = 1

    dL/dlogp = -phi A, nothing through r

k and lambda are vespo_k_pos and vespo_lambda_pos where A >= 0, else vespo_k_neg and _neg.

Paper: arXiv 2602.10693.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.loss.choose import choose
from fusedgrpo.kernels.loss.types import TokenTerms
from fusedgrpo.loss_options import LossOptions

LEAST_LAMBDA = 1e-4


def token_terms(
    ratio: Tensor, advantage: Tensor, logp: Tensor, weight: Tensor, options: LossOptions
) -> TokenTerms:
    by_logp = -weight * advantage
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return TokenTerms(
        value=by_logp * logp,
        by_ratio=torch.zeros_like(ratio),
        by_logp=by_logp,
        low=never,
        high=never,
    )


def completion_weight(log_w: Tensor, advantages: Tensor, options: LossOptions) -> Tensor:
    """``phi [B]``."""
    gain = advantages >= 0
    k = choose(gain, options.vespo_k_pos, options.vespo_k_neg, log_w)
    lam = choose(gain, options.vespo_lambda_pos, options.vespo_lambda_neg, log_w)
    lam = lam.clamp(min=LEAST_LAMBDA)
    return (lam + k * log_w - lam * log_w.exp()).exp()
