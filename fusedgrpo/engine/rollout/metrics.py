"""Metrics of one rollout, under TRL 1.16's names and by its definitions. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.metric_names import MISMATCH_MAX, MISMATCH_MEAN, merged
from fusedgrpo.engine.rewards import RewardBatch
from fusedgrpo.engine.rewards.labels import unique_labels
from fusedgrpo.engine.rollout.types import Completion, Rollout


def completion_metrics(rollout: Rollout) -> dict[str, float]:
    """Lengths of completions in tokens that the policy wrote; "clipped" means stopped by the limit,
    "terminated" by EOS. Where there are tools, how often they were called, too."""
    lengths = [c.own_tokens for c in rollout.completions()]
    ended = [c.own_tokens for c in rollout.completions() if c.finish_reason == "stop"]
    return {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": _mean(ended),
        "completions/min_terminated_length": min(ended, default=0),
        "completions/max_terminated_length": max(ended, default=0),
        **_tool_metrics(list(rollout.completions())),
    }


def _tool_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    """Calls of a completion that were answered, and the share of the answers that are errors."""
    if all(c.messages is None for c in completions):
        return {}
    calls = sum(c.calls for c in completions)
    return {
        "tools/call_frequency": calls / len(completions),
        "tools/failure_frequency": sum(c.failures for c in completions) / calls if calls else 0.0,
    }


def reward_metrics(
    names: Sequence[str], rewards: RewardBatch, group_ids: Tensor, scale_rewards: str
) -> dict[str, Any]:
    """Rewards as they were given (unweighted per function), unbiased std over the rollout.

    ``frac_reward_zero_std`` is the share of completions whose group (or batch, when advantages are
    scaled by the batch) has rewards that are all equal: they carry no signal.
    """
    row: dict[str, Any] = {}
    for f, name in enumerate(unique_labels(names)):
        column = rewards.values[:, f]
        row[f"rewards/{name}/mean"] = _nanmean(column)
        row[f"rewards/{name}/std"] = _nanstd(column)
    row["reward"] = _nanmean(rewards.total)
    row["reward_std"] = _nanstd(rewards.total)
    if scale_rewards == "batch":
        group_ids = torch.zeros_like(group_ids)
    flat = 0
    for group in group_ids.unique():
        members = rewards.total[group_ids == group]
        scored = members[~members.isnan()]
        if len(scored) and scored.max() == scored.min():
            flat += len(members)
    row["frac_reward_zero_std"] = flat / max(len(group_ids), 1)
    if rewards.dropped:
        row["rewards_dropped"] = rewards.dropped
    return merged(row, rewards.metrics)


def filter_metrics(
    total: Tensor, group_ids: Tensor, used: Sequence[int], of_used: Mapping[str, Any]
) -> dict[str, Any]:
    """How much of a rollout dynamic sampling took.

    total: ``[B]``, of all that was sampled. used: the groups that are trained on. of_used: the
    metrics of these alone.

    A group that is left out is solved if all of it has the best reward of the rollout and that is
    above 0, else failed; groups that nothing judged have failed.
    """
    groups = [total[group_ids == g] for g in group_ids.unique()]
    best = total[~total.isnan()].max() if (~total.isnan()).any() else torch.tensor(0.0)
    left = [members for g, members in enumerate(groups) if g not in set(used)]
    solved = sum(bool(best > 0 and members.nanmean() >= best * (1 - 1e-6)) for members in left)
    return {
        "dynamic_sampling/groups": len(groups),
        "dynamic_sampling/groups_kept": len(used),
        "dynamic_sampling/groups_solved": solved,
        "dynamic_sampling/groups_failed": len(left) - solved,
        "dynamic_sampling/kept_reward": of_used["reward"],
        "dynamic_sampling/kept_mean_length": of_used["completions/mean_length"],
    }


def mismatch_metrics(sampler_logp: Tensor, policy_logp: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs ``[N]`` are from the trainer's for the same tokens.

    Far from 0 at temperature sampling without top-k or top-p means that they disagree about the
    weights or the arithmetic.
    """
    both = sampler_logp.isfinite() & policy_logp.isfinite()
    difference = (sampler_logp - policy_logp)[both].abs()
    if not len(difference):
        return {}
    return {MISMATCH_MEAN: float(difference.mean()), MISMATCH_MAX: float(difference.max())}


def weight_metrics(weight: Tensor) -> dict[str, float]:
    """Metrics of the importance weights ``[N]`` after their cap."""
    finite = weight[weight.isfinite()]
    if not len(finite):
        return {}
    name = "sampling/importance_sampling_ratio"
    return {
        f"{name}/min": float(finite.min()),
        f"{name}/mean": float(finite.mean()),
        f"{name}/max": float(finite.max()),
    }


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _nanmean(x: Tensor) -> float | None:
    value = float(x.nanmean()) if len(x) else math.nan
    return None if math.isnan(value) else value


def _nanstd(x: Tensor) -> float | None:
    x = x[~x.isnan()]
    return float(x.std()) if len(x) > 1 else None
