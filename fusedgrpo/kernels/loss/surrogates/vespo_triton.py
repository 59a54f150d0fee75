"""``vespo.py`` in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedgrpo.kernels.loss.surrogates.vespo import LEAST_LAMBDA
from fusedgrpo.loss_options import LossOptions


class Constants(NamedTuple):
    k_pos: float
    k_neg: float
    lambda_pos: float
    lambda_neg: float


def constants(options: LossOptions) -> Constants:
    return Constants(
        options.vespo_k_pos,
        options.vespo_k_neg,
        max(options.vespo_lambda_pos, LEAST_LAMBDA),
        max(options.vespo_lambda_neg, LEAST_LAMBDA),
    )


@triton.jit
def token_terms(ratio, advantage, logp, weight, OPTIONS: tl.constexpr):
    zero = ratio * 0.0
    by_logp = zero - weight * advantage
    never = ratio < 0.0
    return by_logp * logp, zero, by_logp, never, never


@triton.jit
def completion_weight(log_w, advantage, OPTIONS: tl.constexpr):
    k = tl.where(advantage >= 0.0, OPTIONS.k_pos, OPTIONS.k_neg)
    lam = tl.where(advantage >= 0.0, OPTIONS.lambda_pos, OPTIONS.lambda_neg)
    return tl.exp(lam + k * log_w - lam * tl.exp(log_w))
