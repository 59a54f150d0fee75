"""A few completions of an update: their log-probs before it and after it, and under the reference.

This is only for the report, and changes nothing of a run. It shows which tokens an update made more
likely, and how far the policy is from the reference where ``beta`` is 0 and nothing else says it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fusedgrpo.engine.batch_plan import BatchPlan
from fusedgrpo.engine.reporting.completions_log import none_if_nan
from fusedgrpo.engine.rollout.buffer import RolloutBuffer
from fusedgrpo.engine.rollout.token_texts import token_texts
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.scoring import rollout_logprobs
from fusedgrpo.models.packed_batch import own_places

COMPLETIONS = 8  # of a check, at most
CHECKS = 8  # between the first step and the last
SHARE = 0.02  # of the completions of the run, which checks between its ends may score


@dataclass(frozen=True)
class Chosen:
    """Completions of a step.

    rollout: the step that sampled them. logged: of each the number of its group and its place,
    among all that were sampled. buffer: they alone, in that order. rewards: None where there is
    none. before: ``[N]``, the log-probs of all their tokens before the update; None if they were
    not asked for.
    """

    rollout: int
    logged: list[tuple[int, int]]
    buffer: RolloutBuffer
    rewards: list[float | None]
    before: Tensor | None


class DriftCheck:
    """Which steps are checked, and how. ``trainer`` is what ``step`` is a method of. In all
    processes together, for they score in shares."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._has_reference: bool = trainer.args.drift_check and trainer.policy.has_reference

    def steps(self) -> frozenset[int]:
        """The steps whose update is checked."""
        plan: BatchPlan = self.trainer.plan
        if not self.trainer.args.drift_check:
            return frozenset()
        total, each = plan.total_steps, min(COMPLETIONS, plan.completions_per_step)
        between = min(int(SHARE * total * plan.completions_per_step / each), CHECKS, total - 2)
        gaps = max(between, 0) + 1
        return frozenset(1 + round(i * (total - 1) / gaps) for i in range(gaps + 1))

    def choose(self, step: int, *, score: bool) -> Chosen:
        """A few completions of ``step``, the next one or the one that was done last. score: with
        the policy as it is now."""
        trainer = self.trainer
        buffer: RolloutBuffer = trainer.buffer
        behind = buffer.done + step - (trainer.progress.step + 1)  # steps of this rollout
        part = behind % buffer.steps
        samples, _ = buffer.part(part, mask_truncated=trainer.args.mask_truncated_completions)
        places, group_ids = buffer.indices(part), buffer.rollout.group_ids
        # Memory may have run out in one of the processes alone, and all are to choose the same.
        budget = min(trainer.processes.gather(trainer.execution.oom_retry.tokens))
        found = telling(samples, [group_ids[place] for place in places], budget)
        indices = [places[i] for i in found]
        few = buffer.only(indices)
        rewards = [] if buffer.rewards is None else buffer.rewards[indices].tolist()
        return Chosen(
            rollout=step - behind,
            logged=[buffer.logged_at(index) for index in indices],
            buffer=few,
            rewards=[none_if_nan(reward) for reward in rewards] or [None] * len(indices),
            before=self._score(few) if score else None,
        )

    def records(self, chosen: Chosen) -> list[dict[str, Any]]:
        """A record of each completion, after the update."""
        policy, few = self.trainer.policy, chosen.buffer
        after, reference = self._score(few), None
        if self._has_reference:
            # Weights may be swapped for it: held, they come back whatever signal there is.
            with self.trainer.signals.held(), policy.reference():
                reference = self._score(few)
        samples, places = few.part(0, mask_truncated=False)
        finished = [completion.finish_reason for completion in few.rollout.completions()]
        rows = [few.rollout.groups[group].row for group in few.rollout.group_ids]

        def values(
            logp: Tensor | None, tokens: slice, sample: TrainingSample
        ) -> list[float | None] | None:
            """For each token of a completion; None for those that the policy did not write."""
            if logp is None:
                return None
            found: list[float | None] = [None] * len(sample.completion_ids)
            own = own_places(len(sample.completion_ids), sample.given)
            for place, value in zip(own, logp[tokens].tolist(), strict=True):
                found[place] = value
            return found

        return [
            {
                "rollout": chosen.rollout,
                "completion": chosen.logged[i][1],
                "group": chosen.logged[i][0],
                "row": rows[i],
                "prompt": self._decode(list(sample.prompt_ids)),
                "tokens": token_texts(self._decode, sample.completion_ids),
                "given": sample.given,
                "before": values(chosen.before, tokens, sample),
                "after": values(after, tokens, sample),
                "reference": values(reference, tokens, sample),
                "advantage": sample.advantage,
                "reward": chosen.rewards[i],
                "finish_reason": finished[i],
            }
            for i, (sample, tokens) in enumerate(zip(samples, places, strict=True))
        ]

    def _score(self, few: RolloutBuffer) -> Tensor:
        return rollout_logprobs(
            self.trainer.policy,
            few,
            lambda sample: True,
            mask_truncated=False,
            execution=self.trainer.execution,
            refuses=False,  # an update that ruined the policy is the run's to find
        )

    def _decode(self, ids: list[int]) -> str:
        text: str = self.trainer.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def telling(samples: Sequence[TrainingSample], groups: Sequence[int], max_tokens: int) -> list[int]:
    """Which of ``samples`` to look at, ascending: those with the greatest and the least advantages
    in turn, as many groups as there are, and none without an advantage where others have one.

    At most ``COMPLETIONS``, and together at most ``max_tokens`` with their prompts, or a single one
    where each has more. groups: of each sample.
    """
    places = [i for i, sample in enumerate(samples) if sample.completion_ids]
    places = [i for i in places if samples[i].loss_tokens and samples[i].advantage] or places
    rising = sorted(places, key=lambda i: samples[i].advantage)
    pairs = zip(reversed(rising), rising, strict=True)
    order = list(dict.fromkeys(i for both in pairs for i in both))
    sizes = {i: len(samples[i].prompt_ids) + len(samples[i].completion_ids) for i in order}
    fitting = [i for i in order if sizes[i] <= max_tokens]
    if not fitting:
        return sorted(order, key=sizes.__getitem__)[:1]
    found: list[int] = []
    used: Counter[int] = Counter()
    while fitting and len(found) < COMPLETIONS:
        taken = min(fitting, key=lambda i: used[groups[i]])
        found.append(taken)
        used[groups[taken]] += 1
        max_tokens -= sizes[taken]
        fitting = [i for i in fitting if i != taken and sizes[i] <= max_tokens]
    return sorted(found)
