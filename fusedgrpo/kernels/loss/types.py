"""The results of the policy loss, and the limits that both its implementations keep."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fusedgrpo.loss_options import CLIPPED_LOSS_TYPES, LossOptions

# exp(20) is 5e8: no sane ratio is near it, and exp of it and its gradient stay finite in float32.
MAX_LOG_RATIO = 20.0
# The least weight that vespo tells from 0, of a token's sampler and of a completion.
MIN_LOG_WEIGHT = math.log(1e-8)

# What the metrics vector holds, in order.
METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/low_min",
    "clip_ratio/high_mean",
    "clip_ratio/high_max",
    "clip_ratio/region_mean",
    "vespo/phi_seq_mean",
    "kl",
    "entropy",
    "log_ratio_clamped",
    "sampling/dropped_tokens",
)


class LossTerms(NamedTuple):
    """``loss``: 0-dim. ``coefficient [N]``: d loss / d logp. ``metrics``: ``[len(METRICS)]``."""

    loss: Tensor
    coefficient: Tensor
    metrics: Tensor


class PolicyLoss(NamedTuple):
    """``loss``: scalar. ``metrics``: scalar tensors on the loss's device, detached."""

    loss: Tensor
    metrics: dict[str, Tensor]


def name_metrics(
    metrics: Tensor, options: LossOptions, *, entropy: bool, sampler_ratio: bool
) -> dict[str, Tensor]:
    """The entries of ``LossTerms.metrics`` that mean something for these options, by name."""
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if options.loss_type == "cispo":
        named["cispo_clip_ratio"] = named["clip_ratio/high_mean"]
    if options.loss_type not in CLIPPED_LOSS_TYPES:
        named = {k: v for k, v in named.items() if not k.startswith("clip_ratio/")}
    present = {
        "vespo/phi_seq_mean": options.loss_type == "vespo",
        "kl": options.beta != 0,
        "entropy": entropy,
        "sampling/dropped_tokens": sampler_ratio,
    }
    return {name: value for name, value in named.items() if present.get(name, True)}
