"""One optimizer step: micro-batches forward and backward, clip, check, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.samples import Sample, concatenated, has_gradient, loss_mask
from fusedgrpo.engine.seeding import derive, seeded
from fusedgrpo.kernels import LossOptions, policy_loss
from fusedgrpo.models.packing import forwarded_tokens, micro_batches
from fusedgrpo.models.policy import Policy

MISMATCH_MEAN = "sampling/sampling_logp_difference/mean"
MISMATCH_MAX = "sampling/sampling_logp_difference/max"


@dataclass(slots=True)
class UpdateResult:
    """``applied``: False if loss or gradient was not finite and the weights were left alone."""

    applied: bool
    loss: float
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)


class Updater:
    """Holds the optimizer, its schedule and, in float16, the loss scale.

    poll: called between micro-batches, so that a signal does not wait for a long step.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: LossOptions,
        *,
        max_grad_norm: float,
        max_tokens: int,
        entropy_coef: float = 0.0,
        seed: int = 0,
        poll: Callable[[], None] = lambda: None,
    ):
        self.policy = policy
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.options = options
        self.max_grad_norm = max_grad_norm
        self.max_tokens = max_tokens
        self.entropy_coef = entropy_coef
        self.seed = seed
        self.poll = poll
        self.scaler = torch.amp.GradScaler(
            policy.device.type, enabled=policy.compute_dtype == torch.float16
        )

    def step(self, samples: Sequence[Sample], step: int) -> UpdateResult:
        """Update on ``samples``; the denominators are those of all of them together.

        The weights change only if loss and gradient norm are finite. A signal that ``poll`` raises
        leaves weights, optimizer and gradients as they were.
        """
        try:
            loss, metrics = self._accumulate(samples, step)
            parameters = [p for _, p in self.policy.trainable()]
            if all(p.grad is None for p in parameters):
                # Where no sample had a gradient the optimizer still takes its step, as it would
                # have with the zeros that a forward and backward of them yields.
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            result = UpdateResult(False, *torch.stack([loss, norm.to(loss)]).tolist())
            result.metrics = metrics
            result.applied = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
            if result.applied:
                if self.max_grad_norm > 0:
                    torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
                self.scaler.step(self.optimizer)
            self.scaler.update()
            # A skipped update still is a step of the schedule, which is a function of the step.
            self.scheduler.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return result

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _accumulate(self, samples: Sequence[Sample], step: int) -> tuple[Tensor, dict[str, float]]:
        """Gradients of all micro-batches in ``.grad``; the loss as a device tensor."""
        num_items = sum(sample.loss_tokens for sample in samples)
        total = torch.zeros((), device=self.policy.device)
        averager = MetricAverager(self.options)
        skipped = [sample for sample in samples if not self._has_gradient(sample)]
        everything, samples = len(samples), [s for s in samples if self._has_gradient(s)]
        averager.skip(skipped)
        forwarded = 0
        cut = micro_batches([s.pair for s in samples], self.max_tokens, self.policy.layout)
        for index, members in enumerate(cut):
            self.poll()
            batch = [samples[i] for i in members]
            # Dropout, if there is any, repeats itself when the step is run again after a resume.
            with seeded(derive(self.seed, "update", step, index)):
                loss, metrics = self._loss(batch, num_items, everything)
                self.scaler.scale(loss).backward()
            total += loss.detach()
            forwarded += forwarded_tokens([s.pair for s in batch], self.policy.layout)
            tokens = sum(sample.loss_tokens for sample in batch)
            sequences = sum(sample.loss_tokens > 0 for sample in batch)
            averager.add(metrics, tokens, sequences)
        merged = averager.result()
        merged["frac_rows_skipped"] = len(skipped) / max(everything, 1)
        merged["num_forwarded_tokens"] = forwarded
        if "sampling/dropped_tokens" in merged:  # those of rows that were not forwarded, too
            merged["sampling/dropped_tokens"] += sum(sample.dropped_tokens for sample in skipped)
        return total, merged

    def _has_gradient(self, sample: Sample) -> bool:
        return has_gradient(sample, self.options, self.entropy_coef)

    def _loss(
        self, batch: Sequence[Sample], num_items: int, num_sequences: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.policy.device
        packed = self.policy.pack([sample.pair for sample in batch])
        logp, entropy = self.policy.logprobs(
            packed, entropy=True if self.entropy_coef else "detached"
        )
        assert entropy is not None
        mask = loss_mask(batch, device)
        weight = concatenated(batch, "sampler_weight", device)
        old_logp = concatenated(batch, "old_logp", device)
        loss, metrics = policy_loss(
            logp,
            torch.tensor([s.advantage for s in batch], device=device),
            packed.cu_completions,
            old_logp=old_logp,
            ref_logp=concatenated(batch, "ref_logp", device),
            mask=mask,
            sampler_ratio=weight,
            entropy=entropy,
            num_items=num_items,
            num_sequences=num_sequences,
            **self.options.to_dict(),
        )
        sampled = concatenated(batch, "sampler_logp", device)
        if sampled is not None and old_logp is None:
            # The policy that sampled these tokens is the one that was just evaluated.
            gap = torch.where(sampled.isfinite(), (logp.detach() - sampled).abs(), 0.0)
            metrics[MISMATCH_MEAN] = gap.sum() / sampled.isfinite().sum().clamp(min=1)
            metrics[MISMATCH_MAX] = gap.max() if len(gap) else gap.sum()
        if self.entropy_coef:
            metrics["policy_loss"] = loss.detach()
            acting = mask if weight is None else mask & weight.isfinite()
            bonus = torch.where(acting, entropy, 0.0).sum() / max(num_items, 1)
            loss = loss - self.entropy_coef * bonus
        return loss, metrics


class MetricAverager:
    """Merges the metrics of micro-batches into those of the step, as if it had been one batch."""

    SUMS = ("policy_loss", "sampling/dropped_tokens")

    def __init__(self, options: LossOptions):
        self.per_sequence = options.importance_sampling_level == "sequence"
        self.parts: list[tuple[dict[str, Tensor], int, int]] = []
        self.skipped_tokens = self.skipped_sequences = 0

    def add(self, metrics: dict[str, Tensor], tokens: int, sequences: int) -> None:
        # A part without a token says nothing, unless all are like that.
        if self.parts and not self.parts[0][1]:
            self.parts.clear()
        if tokens or not self.parts:
            self.parts.append((metrics, tokens, sequences))

    def skip(self, samples: Sequence[Sample]) -> None:
        """Samples that were not forwarded: nothing of them was clipped, and no more is known."""
        self.skipped_tokens = sum(sample.loss_tokens for sample in samples)
        self.skipped_sequences = sum(sample.loss_tokens > 0 for sample in samples)

    def result(self) -> dict[str, float]:
        names = list(self.parts[0][0]) if self.parts else []
        stacked = [torch.stack([m[name].float() for name in names]) for m, _, _ in self.parts]
        rows = [row.tolist() for row in stacked]
        columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
        return {name: self._merge(name, values) for name, values in columns.items()}

    def _merge(self, name: str, values: list[float]) -> float:
        clip_metric = name.startswith(("clip_ratio/", "cispo_clip_ratio"))
        if clip_metric and self.skipped_sequences:
            values = [*values, 0.0]
        if name in self.SUMS:
            return math.fsum(values)
        if name == "clip_ratio/low_min":
            return min(values)
        if name in ("clip_ratio/high_max", MISMATCH_MAX):
            return max(values)
        by_sequence = name == "vespo/phi_seq_mean" or (
            self.per_sequence and name.startswith(("clip_ratio/", "cispo_", "log_ratio_"))
        )
        weights = [sequences if by_sequence else tokens for _, tokens, sequences in self.parts]
        if len(values) > len(weights):
            weights.append(self.skipped_sequences if by_sequence else self.skipped_tokens)
        return weighted_mean(values, weights)


def weighted_mean(values: Iterable[float], weights: Sequence[int]) -> float:
    """The mean; 0 where all weights are 0."""
    values = list(values)
    total = sum(weights)
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0
