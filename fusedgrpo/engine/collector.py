"""The next rollout: prompts, completions, rewards, advantages. Nothing of it is counted here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.advantages import Estimator
from fusedgrpo.engine.asking import Asking, Questions
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.group_scoring import GroupScoring
from fusedgrpo.engine.group_signal import GroupSignal
from fusedgrpo.engine.reporting.completions_log import completion_records
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rewards.scorers import Scoring
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.metrics import completion_metrics, filter_metrics, reward_metrics
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.types import Group, Rollout
from fusedgrpo.engine.scoring import (
    begin_scoring,
    group_seed,
    make_buffer,
    per_completion,
    score_rollout,
)
from fusedgrpo.engine.seeding import derive, seeded
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
    asking: Asking


Phase = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Tried:
    """A group of a prompt that was tried. example: as it was asked. rewards: of its completions.
    teaches: it has signal, and a completion that is in the loss."""

    group: Group
    example: Example
    rewards: RewardBatch
    teaches: bool


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

    def collect(self, phase: Phase) -> Collected:
        """Sample and score the next prompts; with dynamic sampling others in the place of those
        whose groups have no signal, until there are enough or no more may be tried.

        What is used are the first groups with signal in the order of the prompts, and each group is
        scored by itself: it does not matter what is in flight together, or ends first. Where none
        has any, it is what comes without dynamic sampling: there is nothing to learn then, and the
        step says so.
        """
        trainer, plan = self.trainer, self.trainer.plan
        trainer.stream.share = trainer.progress.step / plan.total_steps
        if plan.sampling_rounds == 1:
            with self._asked(trainer.stream.peek(self._wanted), phase) as questions:
                with phase("sample"):
                    rollout = self.sample(questions)
                with phase("score"):
                    rewards = RewardBatch.joined(self.score(rollout, questions))
            examples = list(questions.examples)
            return Collected(rollout, examples, rewards, tuple(range(len(examples))))
        candidates = trainer.stream.peek(plan.sampling_rounds * plan.groups_per_rollout)
        streams = trainer.sampler.streams and trainer.asking.function is None
        found = self._stream(candidates, phase) if streams else (
            self._in_rounds(candidates, phase)
        )  # fmt: skip
        used = [i for i, one in enumerate(found) if one.teaches] or range(self._wanted)
        return Collected(
            Rollout(tuple(one.group for one in found)),
            [one.example for one in found],
            RewardBatch.joined([one.rewards for one in found]),
            tuple(used),
        )

    @contextlib.contextmanager
    def _asked(
        self, examples: Sequence[Example], phase: Phase, first: int = 0
    ) -> Iterator[Questions]:
        """Inside, ``examples`` are asked, the ``first`` of which has that place in the rollout."""
        trainer = self.trainer
        seed = derive(trainer.args.seed, "sample", trainer.progress.rollouts)
        with contextlib.ExitStack() as stack:
            with phase("sample"):
                questions = stack.enter_context(
                    trainer.asking.begun(examples, seed, trainer.data.encoder, first)
                )
            yield questions

    def _stream(self, candidates: list[Example], phase: Phase) -> list[Tried]:
        """Each group is scored from when it is whole, and the next prompt takes its place if it has
        no signal, while the others are decoded."""
        trainer, found = self.trainer, dict[int, Tried]()
        with self._asked(candidates, phase) as questions:

            def begin(place: int, group: Group) -> Scoring[RewardBatch]:
                rollout, given = Rollout((group,)), self._scored_with()
                with phase("score"):
                    return begin_scoring(
                        trainer.reward_funcs, rollout, questions, range(place, place + 1), **given
                    )

            def teaches(place: int, group: Group, scoring: Scoring[RewardBatch]) -> bool:
                with phase("score"), seeded(group_seed(self._score_seed, place)):
                    rewards = scoring.finish()
                found[place] = self._tried(group, rewards, questions.examples[place])
                return found[place].teaches

            with phase("sample"):
                trainer.sampler.sample_until(
                    [example.prompt_ids for example in questions.examples],
                    trainer.args.num_generations,
                    trainer.sampling,
                    questions.seed,
                    wanted=self._wanted,
                    teaches=GroupScoring(begin, teaches),
                    rows=[example.row for example in questions.examples],
                    **questions.turns,
                )
        return [found[place] for place in range(len(found))]

    def _in_rounds(self, candidates: list[Example], phase: Phase) -> list[Tried]:
        """As many prompts as groups are missing, until none is."""
        found: list[Tried] = []
        while missing := self._wanted - sum(one.teaches for one in found):
            first = len(found)
            chosen = candidates[first : first + missing]
            if not chosen:
                break
            with self._asked(chosen, phase, first) as questions:
                with phase("sample"):
                    sampled = self.sample(questions)
                with phase("score"):
                    scored = self.score(sampled, questions, alone=True)
            found += map(self._tried, sampled.groups, scored, questions.examples)
        return found

    def _tried(self, group: Group, rewards: RewardBatch, example: Example) -> Tried:
        trainer, args = self.trainer, self.trainer.args
        signal = GroupSignal(args, trainer.reward_funcs.weights, trainer.estimate_advantages)
        # With mask_truncated_completions there may be no loss, whatever the rewards.
        in_loss = not args.mask_truncated_completions or any(
            completion.finish_reason != "length" for completion in group.completions
        )
        return Tried(group, example, rewards, in_loss and signal.of_group(rewards))

    @property
    def _wanted(self) -> int:
        """How many groups the next rollout is to have."""
        plan = self.trainer.plan
        if plan.total_prompts is None:
            return plan.groups_per_rollout
        return min(plan.groups_per_rollout, plan.total_prompts - self.trainer.stream.cursor)

    def sample(self, questions: Questions) -> Rollout:
        """``num_generations`` completions for each of ``questions``."""
        trainer = self.trainer
        n, params = trainer.args.num_generations, trainer.sampling
        return Rollout(tuple(trainer.asking.sample(trainer.sampler, questions, n, params)))

    def score(
        self, rollout: Rollout, questions: Questions, *, alone: bool = False
    ) -> list[RewardBatch]:
        """The rewards of the completions, in batches. alone: see ``score_rollout``."""
        trainer = self.trainer
        return score_rollout(
            trainer.reward_funcs,
            rollout,
            questions,
            seed=self._score_seed,
            processes=trainer.processes,
            alone=alone,
            **self._scored_with(),
        )

    @property
    def _score_seed(self) -> int:
        return derive(self.trainer.args.seed, "score", self.trainer.progress.rollouts)

    def _scored_with(self) -> dict[str, Any]:
        """Arguments of scoring that are the run's own."""
        return {
            "conversational": self.trainer.data.conversational,
            "column_names": self.trainer.data.column_names,
            "state": self.reward_state(),
        }

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
        if collected.is_filtered:
            buffer.numbers = list(collected.used)
        if trainer.plan.sampling_rounds > 1:
            buffer.metrics |= self._metrics(collected, buffer)
        return buffer

    def _metrics(self, collected: Collected, buffer: RolloutBuffer) -> dict[str, Any]:
        trainer = self.trainer
        rewards, ids = collected.rewards, collected.group_ids
        return {
            **completion_metrics(collected.rollout),
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
