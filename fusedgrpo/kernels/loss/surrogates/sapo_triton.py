"""``sapo.py`` in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedgrpo.kernels.triton_math import sigmoid
from fusedgrpo.loss_options import LossOptions


class Constants(NamedTuple):
    t_pos: float
    t_neg: float


def constants(options: LossOptions) -> Constants:
    return Constants(options.sapo_temperature_pos, options.sapo_temperature_neg)


@triton.jit
def token_terms(ratio, advantage, logp, weight, OPTIONS: tl.constexpr):
    t = tl.where(advantage > 0.0, OPTIONS.t_pos, OPTIONS.t_neg)
    x = t * (ratio - 1.0)
    value = -sigmoid(x) * 4.0 / t * advantage
    by_ratio = -4.0 * sigmoid(x) * sigmoid(-x) * advantage
    never = ratio < 0.0
    return value, by_ratio, ratio * 0.0, never, never
