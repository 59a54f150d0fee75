"""``cispo.py`` in Triton."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fusedgrpo.loss_options import LossOptions


class Constants(NamedTuple):
    cap: float


def constants(options: LossOptions) -> Constants:
    return Constants(options.upper)


@triton.jit
def token_terms(ratio, advantage, logp, weight, OPTIONS: tl.constexpr):
    by_logp = -tl.where(ratio > OPTIONS.cap, OPTIONS.cap, ratio) * advantage
    high = (ratio > OPTIONS.cap) & (advantage > 0.0)
    return by_logp * logp, ratio * 0.0, by_logp, ratio < 0.0, high
