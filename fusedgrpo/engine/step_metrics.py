"""The metrics of a step out of those of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fusedgrpo.engine.metric_names import MISMATCH_MAX
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.kernels import LossOptions

# Metrics that add up; most are means.
SUMS = ("policy_loss", "sampling/dropped_tokens")


@dataclass(slots=True)
class MicroBatch:
    """The results of one micro-batch. tokens, sequences: those in the loss; forwarded: tokens."""

    tokens: int
    sequences: int
    forwarded: int
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    aux_loss: float = 0.0
    entropy_sum: float = 0.0


def merge_metrics(
    parts: Sequence[MicroBatch], skipped: Sequence[TrainingSample], options: LossOptions
) -> dict[str, float]:
    """The metrics of micro-batches as those of the step, as if it had been one batch.

    skipped: samples that were not forwarded; nothing of them was clipped, and no more is known.
    """
    # A part without a token says nothing, unless all are like that.
    parts = [part for part in parts if part.tokens] or list(parts[-1:])
    names = list(parts[0].metrics) if parts else []
    return {name: _merge(name, parts, skipped, options) for name in names}


def _merge(
    name: str, parts: Sequence[MicroBatch], skipped: Sequence[TrainingSample], options: LossOptions
) -> float:
    values = [part.metrics[name] for part in parts]
    unclipped = sum(sample.loss_tokens > 0 for sample in skipped)
    clip_metric = name.startswith(("clip_ratio/", "cispo_clip_ratio"))
    if clip_metric and unclipped:
        values = [*values, 0.0]
    if name in SUMS:
        return math.fsum(values)
    if name == "clip_ratio/low_min":
        return min(values)
    if name in ("clip_ratio/high_max", MISMATCH_MAX):
        return max(values)
    by_sequence = name == "vespo/phi_seq_mean" or (
        options.importance_sampling_level == "sequence"
        and name.startswith(("clip_ratio/", "cispo_", "log_ratio_"))
    )
    weights = [part.sequences if by_sequence else part.tokens for part in parts]
    if len(values) > len(weights):
        tokens = sum(sample.loss_tokens for sample in skipped)
        weights.append(unclipped if by_sequence else tokens)
    return weighted_mean(values, weights)


def weighted_mean(values: Iterable[float], weights: Sequence[int]) -> float:
    """The mean; 0 where all weights are 0."""
    values = list(values)
    total = sum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0
