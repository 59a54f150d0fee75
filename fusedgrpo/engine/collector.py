"""The next rollout: prompts, completions, rewards, advantages. Nothing of it is counted here."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.advantages import Estimator
from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.reporting.completions_log import completion_records
from fusedgrpo.engine.rewards import RewardBatch, RewardFunctions
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
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


class Collector:
    """Makes the rollout that a trainer's progress is at: asked again, it makes the same one."""

    def __init__(self, trainer: Collecting):
        self.trainer = trainer

    def prompts(self) -> list[Example]:
        """The next prompts, which stay the next until the stream's cursor moves."""
        plan, stream = self.trainer.plan, self.trainer.stream
        count = plan.groups_per_rollout
        if plan.total_prompts is not None:
            count = min(count, plan.total_prompts - stream.cursor)
        return stream.peek(count)

    def sample(self, examples: Sequence[Example]) -> Rollout:
        """``num_generations`` completions for each of ``examples``."""
        args = self.trainer.args
        groups = self.trainer.sampler.sample(
            [example.prompt_ids for example in examples],
            args.num_generations,
            self.trainer.sampling,
            derive(args.seed, "sample", self.trainer.progress.rollouts),
            rows=[example.row for example in examples],
        )
        return Rollout(tuple(groups))

    def score(self, rollout: Rollout, examples: Sequence[Example]) -> RewardBatch:
        """The rewards of the completions."""
        trainer = self.trainer
        return score_rollout(
            trainer.reward_funcs,
            rollout,
            examples,
            conversational=trainer.data.conversational,
            column_names=trainer.data.column_names,
            state=self.reward_state(),
            seed=derive(trainer.args.seed, "score", trainer.progress.rollouts),
            processes=trainer.processes,
        )

    def buffer(self, rollout: Rollout, rewards: RewardBatch) -> RolloutBuffer:
        """The rollout with advantages, and with the log-probs that its loss compares with."""
        trainer = self.trainer
        return make_buffer(
            rollout,
            rewards,
            trainer.reward_funcs,
            trainer.policy,
            trainer.args,
            estimate=trainer.estimate_advantages,
            steps=-(-len(rollout.groups) // trainer.plan.groups_per_step),
            execution=trainer.execution,
        )

    def records(
        self, buffer: RolloutBuffer, rewards: RewardBatch, examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """The entries of a rollout in the log of completions."""
        return completion_records(
            buffer.rollout,
            prompts=[example.prompt for example in per_completion(buffer.rollout, examples)],
            names=self.trainer.reward_funcs.names,
            rewards=rewards.values,
            total=rewards.total,
            advantages=buffer.advantages,
            extra=rewards.extra,
        )

    def reward_state(self) -> SimpleNamespace:
        """The ``trainer_state`` that reward functions get."""
        return SimpleNamespace(
            global_step=self.trainer.progress.step,
            max_steps=self.trainer.plan.total_steps,
            epoch=self.trainer.stream.epoch,
        )
