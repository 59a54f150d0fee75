"""The share of its bound that each phase of a step reached, on a GPU whose speed is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.asking import Asking
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.memory.planner import UNPLANNED
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.rollout.types import Rollout
from fusedgrpo.engine.roofline import work
from fusedgrpo.engine.roofline.cards import find_card
from fusedgrpo.engine.roofline.shape import Shape, UnknownShapeError
from fusedgrpo.engine.roofline.work import Asked, Work
from fusedgrpo.engine.run_sampler import RunSampler
from fusedgrpo.models.policy import Policy


class Stepping(Protocol):
    """The parts of a trainer that the work of its steps follows from."""

    args: GRPOConfig
    policy: Policy
    learner: Learner
    run_sampler: RunSampler
    asking: Asking
    execution: Execution


def card_name(device: torch.device) -> str | None:
    """As torch calls the GPU; None on a CPU."""
    return host.gpu_name(device) if device.type == "cuda" else None


class StepBounds:
    """Counts the work of a step and holds it against the time that its phases took.

    gpu: the name of the card, None without one. unknown: why there is no bound on this GPU, None
    where there is one, or no GPU. Where a phase has none nothing is said: of a sampler that is not
    ours, of scoring without log-probs, of an update that first chooses its tokens.
    """

    def __init__(self, trainer: Stepping, gpu: str | None):
        self.trainer = trainer
        self.card = None if gpu is None else find_card(gpu)
        self.shape: Shape | None = None
        self.unknown: str | None = None
        self._work: dict[str, Work] = {}
        if gpu is not None:
            try:
                self.shape = self._known_shape(gpu)
            except UNPLANNED as error:  # UnknownShapeError among them
                self.unknown = str(error) or type(error).__name__

    def described(self) -> dict[str, Any]:
        """For ``run.json``. flops, bandwidth: of the card, a second."""
        numbers = ("name", "flops", "bandwidth")
        found = {name: self.card and getattr(self.card, name) for name in numbers}
        return {**found, "unknown": self.unknown}

    def collected(self, rollout: Rollout, buffer: RolloutBuffer) -> None:
        """A rollout was sampled and scored: all that was tried, and what of it is trained on."""
        if self.shape is None:
            return
        trainer = self.trainer
        if trainer.run_sampler.chosen.is_ours and trainer.asking.function is None:
            self._work["sample"] = self._sampled(self.shape, rollout)
        truncated = trainer.args.mask_truncated_completions
        parts = [buffer.part(k, mask_truncated=truncated)[0] for k in range(buffer.steps)]
        scored = Work()
        if buffer.old_logp is not None:
            scored += self._scored(self.shape, parts)
        if buffer.ref_logp is not None:
            scored += self._scored(self.shape.without_adapter(), parts)
        self._work["score"] = scored

    def reached(
        self, times: Mapping[str, Any], samples: Sequence[TrainingSample]
    ) -> dict[str, float]:
        """``roofline/sample``, ``roofline/score`` and ``roofline/update``, shares of 1: the bound
        of what was done since the last time, and of an update on ``samples``, over
        ``time/sample`` and so on."""
        if self.shape is None or self.card is None:
            return {}
        done, self._work = {**self._work, "update": self._updated(self.shape, samples)}, {}
        seconds = {phase: part.seconds(self.card) for phase, part in done.items()}
        return {
            f"roofline/{phase}": bound / times[f"time/{phase}"]
            for phase, bound in seconds.items()
            if bound and times[f"time/{phase}"]
        }

    def _known_shape(self, gpu: str) -> Shape:
        policy, processes = self.trainer.policy, self.trainer.execution.processes.size
        if self.card is None:
            raise UnknownShapeError(f"the speed of {gpu} is not known")
        if policy.dtype.itemsize != 2:
            raise UnknownShapeError(f"it computes in {policy.precision}")
        if processes > 1:
            raise UnknownShapeError(f"there are {processes} processes")
        return Shape.of(policy.causal_lm, policy.dtype.itemsize)

    def _sampled(self, shape: Shape, rollout: Rollout) -> Work:
        groups = [
            Asked(len(g.prompt_ids), [c.own_tokens for c in g.completions]) for g in rollout.groups
        ]
        merges = self.trainer.run_sampler.weights == "merged"
        read = shape.merged() if merges else shape.beside()
        in_flight = self.trainer.execution.oom_retry.in_flight
        sampled = work.read_prompts(read, groups) + work.decode(read, groups, in_flight)
        return work.merge(shape) + sampled if merges else sampled

    def _scored(self, shape: Shape, parts: Sequence[Sequence[TrainingSample]]) -> Work:
        learner, layout = self.trainer.learner, self.trainer.policy.layout
        done = Work()
        for samples in parts:
            for batch in self._batches([s for s in samples if learner.trains(s)]):
                spans = work.spans([s.pair for s in batch], layout)
                done += work.forward(shape, spans, sum(s.own_tokens for s in batch))
        return done

    def _updated(self, shape: Shape, samples: Sequence[TrainingSample]) -> Work:
        policy, learner = self.trainer.policy, self.trainer.learner
        done = Work()
        if learner.choice.top_entropy != 1:
            return done
        # A bonus that adapts may have been off in this step, which takes less.
        entropy = learner.bonus.coef != 0 and not learner.bonus.adaptive
        checkpointing = _checkpoints(policy.causal_lm)
        for batch in self._batches([s for s in samples if learner.trains(s)]):
            done += work.update(
                shape,
                work.spans([s.pair for s in batch], policy.layout),
                sum(s.own_tokens for s in batch),
                checkpointing=checkpointing,
                entropy_gradient=entropy,
            )
        return done

    def _batches(self, samples: Sequence[TrainingSample]) -> list[list[TrainingSample]]:
        cut = self.trainer.learner.passes.cut(samples)
        return [[samples[i] for i in members] for members in cut]


def _checkpoints(model: Any) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
