"""Did it learn? The most likely answer to each held-out prompt, before, during and after a run.

This is beside the evaluations that ``eval_strategy`` asks for, and only for the report: it is
greedy, so that two of them differ by the policy alone, and small, so that nobody has to ask for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.data.held_out import HeldOut
from fusedgrpo.engine.evaluation import answer_records, sample_and_score
from fusedgrpo.engine.seeding import derive

PROMPTS = 128  # of all sets together
SHARE = 0.1  # of the completions of the run, which checks between its ends may add
CHECKS = 8  # between the ends


class HeldOutCheck:
    """Which steps are checked, and how. ``trainer`` is what ``evaluate`` is a method of.

    The first prompts of a set that is too large are left out evenly, always the same ones.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @property
    def sets(self) -> dict[str, PromptDataset]:
        """By name, "" where there is one, the prompts that are checked."""
        held_out: HeldOut | None = self.trainer.held_out
        if held_out is None or not self.trainer.args.held_out_check:
            return {}
        sets = dict(held_out) if isinstance(held_out, Mapping) else {"": held_out}
        return {name: _thinned(prompts, PROMPTS // len(sets)) for name, prompts in sets.items()}

    def steps(self) -> frozenset[int]:
        """The steps after which there is a check; 0 is before the first."""
        plan: BatchPlan = self.trainer.plan
        prompts = sum(map(len, self.sets.values()))
        if not prompts:
            return frozenset()
        total = plan.total_steps
        between = min(int(SHARE * total * plan.completions_per_step / prompts), CHECKS, total - 1)
        return frozenset(round(i * total / (between + 1)) for i in range(between + 2))

    def run(self) -> list[dict[str, Any]]:
        """A record of each answer, as in the log of completions, with the name of its set. In all
        processes together."""
        records = []
        for name, prompts in self.sets.items():
            records += [{"set": name, **record} for record in self._of(prompts)]
        return records

    def _at_once(self, prompts: PromptDataset) -> int:
        """How many answers each process samples at once: as many as a rollout has, as far as their
        keys and values take no more than a rollout's, where a group has its prompt's but once."""
        trainer = self.trainer
        group = trainer.args.num_generations
        rows = trainer.plan.groups_per_rollout * group // trainer.processes.size
        rows = min(rows, trainer.execution.oom_retry.in_flight or rows)
        longest = [
            max(len(e.prompt_ids) for e in each.examples) for each in (trainer.data, prompts)
        ]
        tokens = -(-rows // group) * longest[0] + rows * trainer.sampling.max_new_tokens
        return max(1, min(rows, tokens // (longest[1] + trainer.sampling.max_new_tokens)))

    def _of(self, prompts: PromptDataset) -> list[dict[str, Any]]:
        trainer = self.trainer
        answered = sample_and_score(
            prompts,
            trainer.sampler,
            trainer.reward_funcs,
            n=1,
            params=dataclasses.replace(trainer.sampling, greedy=True),
            batch_size=self._at_once(prompts),
            seed=derive(trainer.args.seed, "check"),
            state=trainer.collector.reward_state(),
            asking=trainer.asking,
        )
        records = answer_records(answered, trainer.reward_funcs.names)
        for record in records:
            del record["group"]  # one answer is in none
        return records


def _thinned(prompts: PromptDataset, most: int) -> PromptDataset:
    count = len(prompts)
    if count <= most:
        return prompts
    chosen = [prompts.examples[i * count // most] for i in range(most)]
    return dataclasses.replace(prompts, examples=chosen)
