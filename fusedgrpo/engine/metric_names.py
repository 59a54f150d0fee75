"""The names of metrics: which are the run's own, and what becomes of others that are called so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The names of the run's own metrics, which nobody else's may take.
OWN_METRICS = frozenset({
    "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std",
    "frac_reward_zero_std", "rewards_dropped", "skipped_update", "step_time", "tokens_per_second",
    "entropy", "kl", "policy_loss", "aux_loss", "frac_rows_skipped", "num_forwarded_tokens",
})  # fmt: skip
OWN_PREFIXES = (
    "rewards/", "completions/", "time/", "memory/", "sampling/", "clip_ratio/", "cispo_", "vespo/",
    "log_ratio_", "sapo/", "router", "eval_", "log_metric/", "dynamic_sampling/", "selection/",
    "roofline/",
)  # fmt: skip
USER_METRIC = "log_metric/"

# |log-prob of the sampler - log-prob of the policy| over the sampled tokens.
MISMATCH_MEAN = "sampling/sampling_logp_difference/mean"
MISMATCH_MAX = "sampling/sampling_logp_difference/max"


def is_own_metric(name: str) -> bool:
    """Whether the run itself logs, or may log, something under this name."""
    return name in OWN_METRICS or name.startswith(OWN_PREFIXES)


def merged(own: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """``own`` with ``others`` added, which cannot take a name that is taken."""
    return own | {USER_METRIC + key if key in own else key: value for key, value in others.items()}
