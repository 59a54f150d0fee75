"""One optimizer step: micro-batches forward and backward, clip, check, step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.custom_loss import CustomLoss
from fusedgrpo.engine.entropy_bonus import EntropyBonus
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.metric_names import MISMATCH_MAX, MISMATCH_MEAN
from fusedgrpo.engine.rollout.training_sample import (
    TrainingSample,
    concatenated,
    has_gradient,
    loss_mask,
)
from fusedgrpo.engine.seeding import seeded
from fusedgrpo.engine.step_metrics import MicroBatch, merge_metrics
from fusedgrpo.engine.step_passes import StepPasses
from fusedgrpo.engine.token_choice import TokenChoice
from fusedgrpo.kernels import LossOptions, PolicyLoss, policy_loss
from fusedgrpo.models import missing_backward
from fusedgrpo.models.finite import largest
from fusedgrpo.models.micro_batches import forwarded_tokens, shares
from fusedgrpo.models.policy import Policy, ReferenceSync
from fusedgrpo.models.router import RouterSums
from fusedgrpo.models.sending import send_numbers


@dataclass(slots=True)
class UpdateResult:
    """applied: False if loss or gradient was not finite and the weights were left alone.
    largest_weight: in absolute value, of those that train, on their device and not waited for; not
    finite if any of them is not."""

    applied: bool
    loss: float
    grad_norm: float
    learning_rate: float
    metrics: dict[str, float] = field(default_factory=dict)
    largest_weight: Tensor | None = None


class Learner:
    """Holds the optimizer, its schedule and, in float16, the loss scale.

    A mixture of experts has a load-balancing loss over all tokens of the step. It depends on how
    often each expert is chosen in all of them, so where they are cut, into micro-batches or
    processes, a forward pass without gradients counts first.

    execution: signals are looked for between micro-batches; each process forwards its share of the
    samples, and gradients are summed. bonus, choice: of entropy, and of the tokens that the policy
    learns from. reference: when the reference follows the policy. custom_loss: in place of the one
    in ``options``. offload: entered around the forward pass. changing: called before anything of
    weights or optimizer changes; changed: when the optimizer has taken its step, before its
    gradients are gone.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: LossOptions,
        *,
        max_grad_norm: float,
        execution: Execution,
        custom_loss: CustomLoss | None = None,
        bonus: EntropyBonus | None = None,
        choice: TokenChoice | None = None,
        reference: ReferenceSync | None = None,
        seed: int = 0,
        offload: AbstractContextManager[Any] | None = None,
        changing: Callable[[], None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
    ):
        self.policy = policy
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.options = options
        self.custom_loss = custom_loss
        self.policy_loss: Callable[..., PolicyLoss] = (
            functools.partial(policy_loss, **options.to_dict())
            if custom_loss is None
            else functools.partial(custom_loss, options=options)
        )
        self.max_grad_norm = max_grad_norm
        self.execution = execution
        self.processes = execution.processes
        self.passes = StepPasses(policy, execution)
        self.bonus = bonus or EntropyBonus()
        self.choice = choice or TokenChoice()
        self.reference = reference or ReferenceSync()
        self.seed = seed
        self.offload = offload or nullcontext()
        self.changing = changing
        self.changed = changed
        self.scaler = torch.amp.GradScaler(
            policy.device.type, enabled=policy.compute_dtype == torch.float16
        )
        # It makes its state with the first loss, which a process without work never has.
        self.scaler.scale(torch.zeros((), device=policy.device))

    def step(self, samples: Sequence[TrainingSample], step: int) -> UpdateResult:
        """Update on ``samples``; the denominators are those of all of them together.

        The weights change only if loss and gradient norm are finite. A signal that is raised
        leaves weights, optimizer and gradients as they were.
        """
        try:
            loss, metrics = self._accumulate(samples, step)
            parameters = [p for _, p in self.policy.trainable()]
            self.processes.all_reduce_gradients(parameters)
            if all(p.grad is None for p in parameters):
                # Where no sample had a gradient the optimizer still takes its step, as it would
                # have with the zeros that a forward and backward of them yields.
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
            self.scaler.unscale_(self.optimizer)
            norm = self.execution.oom_retry.repeat(
                lambda: self._norm(parameters), "the gradient norm"
            )
            result = UpdateResult(False, loss, norm.item(), self.learning_rate, metrics)
            result.applied = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
            if result.applied:
                if self.max_grad_norm > 0:
                    torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
                self.changing()
                self.scaler.step(self.optimizer)
                self.changed()
            self.scaler.update()
            # A skipped update still is a step of the schedule, which is a function of the step.
            self.scheduler.step()
            if self.bonus.on:
                self.bonus.update(self._entropy)
                result.metrics["entropy_coef"] = self.bonus.coef
            if self.reference.is_due(step + 1):
                if not result.applied:
                    self.changing()
                self.policy.mix_into_reference(self.reference.alpha)
            result.largest_weight = largest(parameters)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        return result

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def _accumulate(
        self, samples: Sequence[TrainingSample], step: int
    ) -> tuple[float, dict[str, float]]:
        """This process's share of the gradients in ``.grad``; loss and metrics of all samples."""
        num_items = sum(sample.loss_tokens for sample in samples)
        samples, acting = self._chosen(samples, num_items)
        skipped = [sample for sample in samples if not self.trains(sample)]
        live = [sample for sample in samples if self.trains(sample)]
        own = shares([s.pair for s in live], self.processes.size)[self.processes.rank]
        mine = live[own.start : own.stop]
        load = None
        if self.policy.router is not None and self.processes.size > 1:
            load = self.passes.router_load_of_all(mine)
        done = self.processes.run_everywhere(
            lambda: self._backward_that_fits(mine, num_items, len(samples), step, load, acting)
        )
        parts = [part for of_process in done for part in of_process]
        merged = merge_metrics(parts, skipped, self.options)
        merged["frac_rows_skipped"] = len(skipped) / max(len(samples), 1)
        merged["num_forwarded_tokens"] = sum(part.forwarded for part in parts)
        self._entropy = math.fsum(part.entropy_sum for part in parts) / max(acting, 1)
        if self.policy.router is not None:
            merged["aux_loss"] = math.fsum(part.aux_loss for part in parts)
        if "sampling/dropped_tokens" in merged:  # those of rows that were not forwarded, too
            merged["sampling/dropped_tokens"] += sum(sample.dropped_tokens for sample in skipped)
        return math.fsum(part.loss for part in parts), merged

    def _chosen(
        self, samples: Sequence[TrainingSample], num_items: int
    ) -> tuple[Sequence[TrainingSample], int]:
        """The samples with the tokens that the surrogate is of, and how many these are. That is
        asked of all tokens of the step, before the update is cut into micro-batches."""
        if self.choice.top_entropy == 1:
            return samples, num_items
        counted = [i for i, sample in enumerate(samples) if sample.loss_tokens]
        entropies = self.passes.entropies([samples[i] for i in counted])
        return self.choice.select(samples, counted, entropies)

    def _backward_that_fits(
        self,
        samples: Sequence[TrainingSample],
        num_items: int,
        num_sequences: int,
        step: int,
        load: RouterSums | None,
        acting: int,
    ) -> list[MicroBatch]:
        def work() -> list[MicroBatch]:
            self.optimizer.zero_grad(set_to_none=True)  # what a failed attempt has left
            return self.backward(samples, num_items, num_sequences, step, load, acting)

        return self.execution.oom_retry.update(
            work, lambda: self.passes.longest(samples), "the update"
        )

    def backward(
        self,
        samples: Sequence[TrainingSample],
        num_items: int,
        num_sequences: int,
        step: int,
        load: RouterSums | None = None,
        acting: int | None = None,
    ) -> list[MicroBatch]:
        """Forward and backward of ``samples``, micro-batch by micro-batch.

        acting: the tokens of the step that the entropy bonus is over; None for ``num_items``.
        load: what the router does with all tokens of the step, where ``samples`` are not all.
        """
        acting = num_items if acting is None else acting
        layout, whole = self.policy.layout, self.policy.whole
        cut = self.passes.cut(samples)
        if self.policy.router is not None and load is None and len(cut) > 1:
            load = self.passes.router_load(samples)
        parts: list[MicroBatch] = []
        measured: list[Tensor] = []
        names: list[str] = []
        with self.policy.training():  # also around backward: checkpointing forwards again in it
            for index, members in enumerate(cut):
                self.execution.check_interrupt()
                batch = [samples[i] for i in members]
                # Dropout, if there is any, repeats itself when the step is run again on resume.
                with seeded(self.processes.derive(self.seed, "update", step, index)):
                    loss, metrics = self._loss(batch, num_items, num_sequences, load, acting)
                    with missing_backward.refused():
                        self.scaler.scale(loss).backward()
                names = list(metrics)
                numbers = [loss.detach(), *metrics.values()]
                del loss  # and its graph, before the next forward pass
                measured.append(torch.stack([number.to(numbers[0].dtype) for number in numbers]))
                parts.append(
                    MicroBatch(
                        tokens=sum(sample.loss_tokens for sample in batch),
                        sequences=sum(sample.loss_tokens > 0 for sample in batch),
                        forwarded=forwarded_tokens([s.pair for s in batch], layout, whole=whole),
                    )
                )
        # Only now, when nothing is left to start, wait for the device, once.
        rows = torch.stack(measured).tolist() if measured else []
        for part, (part_loss, *values) in zip(parts, rows, strict=True):
            part.loss = part_loss
            part.metrics = dict(zip(names, values, strict=True))
            part.aux_loss = part.metrics.pop("aux_loss", 0.0)
            part.entropy_sum = part.metrics.pop("entropy_sum", 0.0)
        return parts

    def _norm(self, parameters: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def trains(self, sample: TrainingSample) -> bool:
        """Whether the loss of ``sample`` has a gradient, or is forwarded all the same."""
        # The router's loss has a gradient in all of them.
        custom = self.custom_loss is not None
        return self.policy.whole or has_gradient(sample, self.options, self.bonus.on, custom=custom)

    def _loss(
        self,
        batch: Sequence[TrainingSample],
        num_items: int,
        num_sequences: int,
        load: RouterSums | None,
        acting: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = self.policy.device
        packed = self.passes.packed(batch)
        routed: list[RouterSums] = []
        with self.offload:
            logp, entropy = self.policy.logprobs(
                packed,
                entropy=True if self.bonus.weight else "detached",
                **({} if self.policy.router is None else {"routed": routed}),
            )
        assert entropy is not None
        mask = loss_mask(batch, device)
        weight = concatenated(batch, "sampler_weight", device)
        old_logp = concatenated(batch, "old_logp", device)
        advantages = send_numbers([s.advantage for s in batch], device, torch.float32)
        loss, metrics = self.policy_loss(
            logp,
            advantages,
            packed.cu_completions,
            old_logp=old_logp,
            ref_logp=concatenated(batch, "ref_logp", device),
            mask=mask,
            sampler_ratio=self.choice.weights(
                batch, weight, logp.detach(), old_logp, advantages, packed.cu_completions
            ),
            entropy=entropy,
            num_items=num_items,
            num_sequences=num_sequences,
        )
        sampled = concatenated(batch, "sampler_logp", device)
        if sampled is not None and old_logp is None:
            # The policy that sampled these tokens is the one that was just evaluated.
            gap = torch.where(sampled.isfinite(), (logp.detach() - sampled).abs(), 0.0)
            metrics[MISMATCH_MEAN] = gap.sum() / sampled.isfinite().sum().clamp(min=1)
            metrics[MISMATCH_MAX] = gap.max() if len(gap) else gap.sum()
        if weight is None:
            metrics.pop("sampling/dropped_tokens", None)  # our own weights drop none
        if self.bonus.on:
            metrics["policy_loss"] = loss.detach()
            acts = mask if weight is None else mask & weight.isfinite()
            selected = concatenated(batch, "selected", device)
            acts = acts if selected is None else acts & selected
            total = torch.where(acts, entropy, 0.0).sum()
            metrics["entropy_sum"] = total.detach()
            if self.bonus.weight:
                loss = loss - self.bonus.weight * (total / max(acting, 1))
        if self.policy.router is not None:
            balance = self.policy.router.loss(routed[0], load).to(loss.device)
            metrics["aux_loss"] = balance.detach()
            loss = loss + self.policy.router.coef * balance
        return loss, metrics
