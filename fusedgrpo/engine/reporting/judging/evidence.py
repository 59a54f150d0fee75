"""The rows of a run, sorted by what they are evidence of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.held_out_log import (
    GREEDY,
    Checks,
    check_rows,
    rewards_by_prompt,
    sets_of,
)
from fusedgrpo.engine.reporting.judging.bootstrap import margin_over_prompts
from fusedgrpo.engine.reporting.judging.changes import (
    Change,
    is_share,
    least,
    of_evaluations,
    of_training,
    window_of,
)
from fusedgrpo.engine.reporting.metrics_log import (
    Row,
    finite,
    reward_names,
    rollout_rows,
    series,
)

RECENT = 5  # rollouts, the fewest that "at the end" is said of
_EVALUATED = re.compile(r"eval_(?:(?P<set>.+)_)?reward")
# Rewards for how an answer looks, by their names: that one of these rose says little of the answer.
_STYLE = re.compile(
    r"format|length|(?:^|_)len(?:_|$)|brevity|concise|overlong|repetition|think|tag|xml|style|bonus",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Evidence:
    """rows: of ``metrics.jsonl``, in order. config: the run's options. checks: the most likely
    answers to held-out prompts, by step. scores: of all completions of its rollouts; without them
    the intervals of rewards in training are from the means of steps."""

    rows: Sequence[Row]
    config: Mapping[str, Any] = field(default_factory=dict)
    checks: Checks = field(default_factory=dict)
    scores: Scores | None = None

    @cached_property
    def evaluations(self) -> list[Row]:
        """The rows that evaluations are read from, with the means of the checks as rows."""
        return [*self.rows, *check_rows(self.checks)]

    @cached_property
    def rollouts(self) -> list[Row]:
        return rollout_rows(row for row in self.rows if row["step"] > 0)

    @cached_property
    def updates(self) -> list[Row]:
        """The rows of optimizer steps."""
        return [row for row in self.rows if row["step"] > 0]

    def training(self, key: str) -> Change | None:
        return of_training(*series(self.rollouts, key))

    def rewarded(self, key: str) -> Change | None:
        """``training`` of a reward; its interval is from resampling prompts where their scores are
        known. Whether it fell back is not: the best of the windows is one of other prompts."""
        change, values = self.training(key), self._scored(key)
        if change is None or self.scores is None or values is None:
            return change
        steps, means = series(self.rollouts, key)
        window = window_of(len(steps))
        found = margin_over_prompts(self.scores, values, steps[:window], steps[-window:])
        if found is None:
            return change
        margin, prompts = found
        return replace(change, margin=max(margin, least(means)), prompts=prompts)

    def _scored(self, key: str) -> np.ndarray | None:
        """The values behind the means of a reward, ``[B]``."""
        if self.scores is None:
            return None
        if key == "reward":
            return self.scores.reward
        return self.scores.parts.get(key.removeprefix("rewards/").removesuffix("/mean"))

    def values(self, key: str) -> list[float]:
        return series(self.rollouts, key)[1]

    def at_the_end(self, key: str) -> float | None:
        """Mean over the last tenth of the rollouts, 5 at least; None where it has none there."""
        last = series(self.rollouts[-max(RECENT, len(self.rollouts) // 10) :], key)[1]
        return fmean(last) if last else None

    @property
    def last_steps(self) -> tuple[int, int]:
        """The steps that ``at_the_end`` is about."""
        last = self.rollouts[-max(RECENT, len(self.rollouts) // 10) :]
        return (last[0]["step"], last[-1]["step"])

    @cached_property
    def sum(self) -> Change | None:
        return self.rewarded("reward")

    @cached_property
    def components(self) -> dict[str, Change]:
        """The change of each reward function by itself in training. What is weighted negatively
        has its sign turned, what weighs nothing is left out."""
        return self._each(lambda name: self.rewarded(f"rewards/{name}/mean"))

    @cached_property
    def held_out(self) -> dict[str, Change]:
        """By name of an evaluation set, "" where there is one, the change of its reward."""
        prompts = {
            name: rewards_by_prompt(self.checks, checked)
            for name, checked in self._checked_sets.items()
        }
        found = {}
        for key in sorted({key for row in self.evaluations for key in row}):
            if match := _EVALUATED.fullmatch(key):
                name = match["set"] or ""
                if (change := self._evaluated(key, prompts.get(name))) is not None:
                    found[name] = change
        return found

    @cached_property
    def _checked_sets(self) -> dict[str, str]:
        """The sets of ``checks`` by their names among the evaluations."""
        return {f"{name}_{GREEDY}" if name else GREEDY: name for name in sets_of(self.checks)}

    def held_out_parts(self, name: str) -> dict[str, Change]:
        """The change of each reward function by itself on the evaluation set ``name``."""
        before = f"eval_{name}_" if name else "eval_"
        checked = self._checked_sets.get(name)

        def change_of(reward: str) -> Change | None:
            prompts = None if checked is None else rewards_by_prompt(self.checks, checked, reward)
            return self._evaluated(f"{before}rewards/{reward}/mean", prompts)

        return self._each(change_of)

    @cached_property
    def held_out_components(self) -> dict[str, Change]:
        """The same over all sets, with the set's name behind the reward's."""
        return {
            f"{reward} ({name})" if name else reward: change
            for name in self.held_out
            for reward, change in self.held_out_parts(name).items()
        }

    def at_their_tops(self, share: float) -> bool | None:
        """Whether all rewards are at the end at ``share`` of the greatest that they can be. None
        where one is on a scale that nobody has told us: its greatest mean may be of half-right
        answers."""
        keys = [f"rewards/{name}/mean" for name, weight in self._weights().items() if weight > 0]
        found = {key: self.at_the_end(key) for key in keys or ["reward"]}
        shares = {
            key: v for key, v in found.items() if v is not None and is_share(self.values(key))
        }
        if any(value < share for value in shares.values()):
            return False
        return True if len(shares) == len(found) else None

    @property
    def prompts_are_chosen(self) -> bool:
        """Whether prompts of late steps are others than those of early ones, by how hard they are:
        rewards in training say less then."""
        return self.config.get("prompt_selection", "uniform") not in (None, "uniform")

    def is_style(self, name: str) -> bool:
        return _STYLE.search(name) is not None

    def option(self, name: str) -> float | None:
        return finite(self.config.get(name))

    def _weights(self) -> dict[str, float]:
        """By reward function, of those that weigh something."""
        names = reward_names(self.rows)
        given = self.config.get("reward_weights")
        weights = [finite(weight) for weight in given] if isinstance(given, list) else []
        if len(weights) != len(names) or None in weights:
            weights = [1.0] * len(names)
        return {name: weight for name, weight in zip(names, weights, strict=True) if weight}

    def _each(self, change_of: Callable[[str], Change | None]) -> dict[str, Change]:
        found = {}
        for name, weight in self._weights().items():
            if (change := change_of(name)) is not None:
                found[name] = change if weight > 0 else change.turned()
        return found

    def _evaluated(
        self, key: str, prompts: Mapping[int, Mapping[int, float]] | None = None
    ) -> Change | None:
        steps, values = series(self.evaluations, key)
        std = key.removesuffix("/mean") + "/std" if key.endswith("/mean") else f"{key}_std"
        _, spreads = series(self.evaluations, std)
        return of_evaluations(steps, values, max(spreads) if spreads else None, prompts)
