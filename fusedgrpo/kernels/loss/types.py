"""Arguments and results of the policy loss, and the limits that both its implementations keep."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fusedgrpo.loss_options import LossOptions

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


class PerToken(NamedTuple):
    """The optional tensors ``[N]`` of the tokens beside their logp; meanings as in
    ``policy_loss``."""

    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    mask: Tensor | None = None
    sampler_ratio: Tensor | None = None
    entropy: Tensor | None = None

    def at(self, tokens: Tensor | slice) -> PerToken:
        return PerToken(*(None if x is None else x[tokens] for x in self))


class TokenTerms(NamedTuple):
    """A surrogate and its derivatives for each token, all ``[N]``.

    value: the loss. by_ratio: its derivative by the ratio. by_logp: by logp where it stands on its
    own. low, high: bool, is the ratio clipped from below, from above.
    """

    value: Tensor
    by_ratio: Tensor
    by_logp: Tensor
    low: Tensor
    high: Tensor


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
    found = dict(zip(METRICS, metrics.unbind(), strict=True))
    own = options.kind.metrics
    present = {
        "kl": options.beta != 0,
        "entropy": entropy,
        "log_ratio_clamped": True,
        "sampling/dropped_tokens": sampler_ratio,
    }
    named = {name: x for name, x in found.items() if name in own or present.get(name)}
    return named | {name: found[entry] for name, entry in own.items()}
