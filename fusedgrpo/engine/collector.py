"""The next rollout: prompts, completions, rewards, advantages. Nothing of it is counted here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.advantages import Estimator
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.group_signal import GroupSignal
from fusedgrpo.engine.reporting.completions_log import completion_records
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.metrics import filter_metrics, length_metrics, reward_metrics
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.types import Rollout
from fusedgrpo.engine.scoring import make_buffer, per_completion, score_rollout
from fusedgrpo.engine.seeding import derive
from fusedgrpo.models.policy import Policy


class Collecting(Protocol):
    """The parts of a trainer that its rollouts come from."""

    args: GRPOConfig
    policy: Policy
    plan: BatchPlan
    stream: PromptStream
    progress: Progress
    data: PromptDataset
    sampler: Sampler
    sampling: SamplingParams
    reward_funcs: RewardFunctions
    estimate_advantages: Estimator
    execution: Execution
    processes: Processes


@dataclass(frozen=True)
class Collected:
    """All that was sampled and scored for a rollout: groups, the examples that they answer, their
    rewards; and the places of the groups that are trained on."""

    rollout: Rollout
    examples: list[Example]
    rewards: RewardBatch
    used: tuple[int, ...]

    @property
    def group_ids(self) -> torch.Tensor:
        return torch.tensor(self.rollout.group_ids)

    @property
    def totals(self) -> torch.Tensor:
        """``[groups, G]``: the weighted sums of rewards."""
        return self.rewards.total.reshape(len(self.rollout.groups), -1)

    @property
    def used_rows(self) -> torch.Tensor:
        """``[B]`` bool: the completions that are trained on."""
        return torch.isin(self.group_ids, torch.tensor(self.used))

    @property
    def is_filtered(self) -> bool:
        return len(self.used) < len(self.rollout.groups)


class Collector:
    """Makes the rollout that a trainer's progress is at: asked again, it makes the same one."""

    def __init__(self, trainer: Collecting):
        self.trainer = trainer

    def collect(self, phase: Callable[[str], AbstractContextManager[None]]) -> Collected:
        """Sample and score the next prompts; with dynamic sampling others in the place of those
        whose groups have no signal, until there are enough or no more may be tried.

        What is used are the first groups with signal in the order of the prompts, so it does not
        matter how many are sampled at once. Where none has any, it is what comes without dynamic
        sampling: there is nothing to learn then, and the step says so.
        """
        plan = self.trainer.plan
        self.trainer.stream.share = self.trainer.progress.step / plan.total_steps
        rollout, examples, scored = Rollout(()), list[Example](), list[RewardBatch]()
        signal: list[bool] = []
        while missing := min(
            self._wanted - sum(signal),
            plan.sampling_rounds * plan.groups_per_rollout - len(examples),
        ):
            chosen = self.trainer.stream.peek(len(examples) + missing)[len(examples) :]
            with phase("sample"):
                sampled = self.sample(chosen, first=len(examples))
            with phase("score"):
                scored.append(self.score(sampled, chosen, number=len(scored)))
            if plan.sampling_rounds == 1:
                return Collected(sampled, chosen, scored[0], tuple(range(len(chosen))))
            signal += self._signal.of(scored[-1], torch.tensor(sampled.group_ids))
            examples += chosen
            rollout = Rollout(rollout.groups + sampled.groups)
        used = [i for i, has_any in enumerate(signal) if has_any] or range(self._wanted)
        return Collected(rollout, examples, RewardBatch.joined(scored), tuple(used))

    @property
    def _wanted(self) -> int:
        """How many groups the next rollout is to have."""
        plan = self.trainer.plan
        if plan.total_prompts is None:
            return plan.groups_per_rollout
        return min(plan.groups_per_rollout, plan.total_prompts - self.trainer.stream.cursor)

    @property
    def _signal(self) -> GroupSignal:
        trainer = self.trainer
        return GroupSignal(trainer.args, trainer.reward_funcs.weights, trainer.estimate_advantages)

    def sample(self, examples: Sequence[Example], first: int = 0) -> Rollout:
        """``num_generations`` completions for each of ``examples``, the ``first`` of which has that
        place in the rollout."""
        args = self.trainer.args
        groups = self.trainer.sampler.sample(
            [example.prompt_ids for example in examples],
            args.num_generations,
            self.trainer.sampling,
            derive(args.seed, "sample", self.trainer.progress.rollouts),
            rows=[example.row for example in examples],
            **({"first": first} if first else {}),
        )
        return Rollout(tuple(groups))

    def score(self, rollout: Rollout, examples: Sequence[Example], number: int = 0) -> RewardBatch:
        """The rewards of the completions; ``number`` counts the calls for one rollout."""
        trainer = self.trainer
        purpose = ("score", trainer.progress.rollouts, *([number] if number else []))
        return score_rollout(
            trainer.reward_funcs,
            rollout,
            examples,
            conversational=trainer.data.conversational,
            column_names=trainer.data.column_names,
            state=self.reward_state(),
            seed=derive(trainer.args.seed, *purpose),
            processes=trainer.processes,
        )

    def buffer(self, collected: Collected) -> RolloutBuffer:
        """The groups that are used, with advantages and the log-probs that their loss compares
        with. Metrics are of all that was sampled, and say what was used of that."""
        trainer = self.trainer
        rollout, rewards = collected.rollout, collected.rewards
        if collected.is_filtered:
            rollout = Rollout(tuple(rollout.groups[i] for i in collected.used))
            rewards = rewards.chosen(collected.used_rows)
        buffer = make_buffer(
            rollout,
            rewards,
            trainer.reward_funcs,
            trainer.policy,
            trainer.args,
            estimate=trainer.estimate_advantages,
            steps=-(-len(rollout.groups) // trainer.plan.groups_per_step),
            execution=trainer.execution,
        )
        if trainer.plan.sampling_rounds > 1:
            buffer.metrics |= self._metrics(collected, buffer)
        return buffer

    def _metrics(self, collected: Collected, buffer: RolloutBuffer) -> dict[str, Any]:
        trainer = self.trainer
        rewards, ids = collected.rewards, collected.group_ids
        return {
            **length_metrics(collected.rollout),
            **reward_metrics(trainer.reward_funcs.names, rewards, ids, trainer.args.scale_rewards),
            **filter_metrics(rewards.total, ids, collected.used, buffer.metrics),
            "dynamic_sampling/rounds": len(collected.examples) / self._wanted,
        }

    def records(self, collected: Collected, buffer: RolloutBuffer) -> list[dict[str, Any]]:
        """The entries of a rollout in the log of completions; of those that are not used
        ``advantage`` is None."""
        rollout, rewards = collected.rollout, collected.rewards
        advantages = torch.full((len(rewards.total),), torch.nan)
        advantages[collected.used_rows] = buffer.advantages
        return completion_records(
            rollout,
            prompts=[example.prompt for example in per_completion(rollout, collected.examples)],
            names=self.trainer.reward_funcs.names,
            rewards=rewards.values,
            total=rewards.total,
            advantages=advantages,
            extra=rewards.extra,
        )

    def reward_state(self) -> SimpleNamespace:
        """The ``trainer_state`` that reward functions get."""
        return SimpleNamespace(
            global_step=self.trainer.progress.step,
            max_steps=self.trainer.plan.total_steps,
            epoch=self.trainer.stream.epoch,
        )
