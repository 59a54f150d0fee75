"""All reward functions of a run, scored together into one ``[B, F]`` matrix."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fusedgrpo.config.redaction import hide_known
from fusedgrpo.engine.columns import NOT_COLUMNS
from fusedgrpo.engine.metric_names import USER_METRIC, is_own_metric
from fusedgrpo.engine.rewards.call import Batch, CallFailed, Reply
from fusedgrpo.engine.rewards.labels import unique_labels
from fusedgrpo.engine.rewards.scorers import Scorer, Scoring, finished, started
from fusedgrpo.errors import RewardError, ToolError, brief

logger = logging.getLogger("fusedgrpo")

FAILED_BATCHES_IN_A_ROW = 3
SECONDS_TO_FIND_THE_CULPRIT = 30.0
_REMEDY = "Fix the function, or set on_reward_error: drop to leave such completions out"


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """The rewards of B completions under F functions, on the CPU.

    values: float32 ``[B, F]``, NaN where a function does not apply. total: float32 ``[B]``, the
    weighted sum, NaN where none applies. seconds: wall time by function. extra: column -> B
    values (``log_extra``). metrics: means of what ``log_metric`` was given. dropped: rewards
    lost to failing functions under ``on_error="drop"``.
    """

    values: torch.Tensor
    total: torch.Tensor
    seconds: dict[str, float]
    extra: dict[str, list[Any]]
    metrics: dict[str, float]
    dropped: int

    @classmethod
    def joined(cls, parts: Sequence[RewardBatch]) -> RewardBatch:
        """Batches of the same functions end to end. Wall times are those of the slowest part,
        metrics the mean of the parts that have them, by their completions; a column is None where a
        part has none."""
        if len(parts) == 1:
            return parts[0]
        names = dict.fromkeys(name for part in parts for name in part.extra)
        logged = dict.fromkeys(name for part in parts for name in part.metrics)
        timed = dict.fromkeys(name for part in parts for name in part.seconds)
        return cls(
            values=torch.cat([part.values for part in parts]),
            total=torch.cat([part.total for part in parts]),
            seconds={n: max(part.seconds.get(n, 0.0) for part in parts) for n in timed},
            extra={
                name: [
                    value
                    for part in parts
                    for value in part.extra.get(name, [None] * len(part.total))
                ]
                for name in names
            },
            metrics={name: _mean_of(name, parts) for name in logged},
            dropped=sum(part.dropped for part in parts),
        )

    def chosen(self, rows: torch.Tensor) -> RewardBatch:
        """The rewards of some completions, ``[B]`` bool; what is of the whole batch stays."""
        return dataclasses.replace(
            self,
            values=self.values[rows],
            total=self.total[rows],
            extra={
                name: [value for value, take in zip(column, rows.tolist(), strict=True) if take]
                for name, column in self.extra.items()
            },
        )


class RewardFunctions:
    """The reward functions of a run. Close it, or use it as a context manager.

    names: F names, by which metrics and logs go, no two the same. weights: float32 ``[F]``.
    tokenizers: F, those of reward models; None for what is none. patience: how many completions in
    a row a function may fail on at least before that is the function's fault and not theirs, where
    batches are small.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float], on_error: str):
        self.names = unique_labels([scorer.name for scorer in scorers])
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.tokenizers = [getattr(scorer, "tokenizer", None) for scorer in scorers]
        self._scorers = list(scorers)
        self._drop = on_error == "drop"
        self.patience = 0
        self._failed_batches = [0] * len(self._scorers)
        self._failed_completions = [0] * len(self._scorers)
        self._said_unscored = False
        # From what environments go by to the environments themselves, where a run has some.
        self.environments_of: Callable[[Sequence[Any]], list[Any]] | None = None
        self._renamed: set[str] = set()

    def __len__(self) -> int:
        """How many there are: F."""
        return len(self.names)

    @property
    def bytes(self) -> int:
        """Weights of reward models, which are on the run's device."""
        return sum(getattr(scorer, "bytes", 0) for scorer in self._scorers)

    def begin(
        self,
        *,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        trainer_state: Any = None,
        rows: list[int],
        environments: Sequence[Hashable] | None = None,
    ) -> Scoring[RewardBatch]:
        """Have B completions scored, all arguments of length B and in the same order; to be
        finished before others begin.

        columns: the data's columns. rows: data row of each completion, for messages. environments:
        by which those that the completions acted in go, where there are any.
        """
        columns = {name: values for name, values in columns.items() if name not in NOT_COLUMNS}
        if environments is not None:
            columns |= self._environments(environments)
        given = {"prompts": prompts, "completion_ids": completion_ids, "rows": rows, **columns}
        for name, values in given.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(completions)} completions"
                )
        batch = Batch(
            prompts, completions, completion_ids, columns, trainer_state, rows, environments
        )
        return Scoring(self._scorers, batch, self._replied)

    def score(self, **batch: Any) -> RewardBatch:
        """Rewards of completions, given as to :meth:`begin`.

        Raises :class:`RewardError` if a function returns something else than B rewards and, with
        ``on_error="halt"``, if it raises, hangs, dies or returns NaN or infinity.
        """
        return self.begin(**batch).finish()

    def _replied(self, batch: Batch, outcomes: Sequence[Reply | CallFailed]) -> RewardBatch:
        dropped = 0
        replies = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, CallFailed):
                outcome = self._settle(index, batch, outcome)
            self._take_failures(index, batch, outcome)
            dropped += len(outcome.failures)
            replies.append(outcome)
        return self._collect(batch, replies, dropped)

    def _environments(self, keys: Sequence[Hashable]) -> dict[str, list[Any]]:
        """The column of environments, if a function takes it. Raises ToolError for those that
        cannot be had where one names it; one that takes anything does without."""
        taken = {getattr(scorer, "takes_environments", False) for scorer in self._scorers}
        if self.environments_of is None or taken == {False}:
            return {}
        try:
            return {"environments": self.environments_of(keys)}
        except ToolError:
            if True in taken:
                raise
            return {}

    def close(self) -> None:
        """End the worker processes and the event loop."""
        for scorer in self._scorers:
            scorer.close()

    def __enter__(self) -> RewardFunctions:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _settle(self, index: int, batch: Batch, failure: CallFailed) -> Reply:
        """Find the completions that a function fails on, by scoring each of them alone.

        Returns the rewards of the others (without what they log), or raises RewardError.
        """
        scorer, count = self._scorers[index], len(batch)
        if failure.details:
            logger.error(
                "reward function %r failed:\n%s", self.names[index], failure.details.rstrip()
            )
        reply = Reply([math.nan] * count, dict.fromkeys(range(count), str(failure)))
        end = math.inf if self._drop else time.monotonic() + SECONDS_TO_FIND_THE_CULPRIT
        for i in range(count):
            if not failure.repeatable or time.monotonic() > end:
                break
            (outcome,) = finished([scorer], started([scorer], batch.only(i)))
            if isinstance(outcome, CallFailed):
                failure = outcome
                reply.failures[i] = str(failure)
                if not self._drop:
                    return Reply(reply.values, {i: str(failure)})
            else:
                reply.values[i] = outcome.values[0]
                del reply.failures[i]
                if outcome.failures:
                    reply.failures[i] = outcome.failures[0]
        if not self._drop:
            raise RewardError(
                f"reward function {self.names[index]!r} failed on a batch of {count} completions: "
                f"{failure}. {_REMEDY}"
            ) from failure
        return reply

    def _take_failures(self, index: int, batch: Batch, reply: Reply) -> None:
        """Leave out the completions that a function failed on, and say so; RewardError where the
        run is to halt, and where the function fails on everything."""
        lost, count = reply.failures, len(batch)
        everything = len(lost) == count
        self._failed_batches[index] = self._failed_batches[index] + 1 if everything else 0
        self._failed_completions[index] = (
            self._failed_completions[index] + count if everything else 0
        )
        if not lost:
            return
        who = f"reward function {self.names[index]!r}"
        i, reason = next(iter(lost.items()))
        if not self._drop:
            raise RewardError(
                f"{who} failed on completion {i} of {count} (data row {batch.rows[i]}): {reason}. "
                f"The completion: {repr(batch.completions[i])[:300]}. {_REMEDY}"
            )
        batches = self._failed_batches[index]
        enough = self._failed_completions[index] >= self.patience
        if batches >= FAILED_BATCHES_IN_A_ROW and enough:
            raise RewardError(
                f"{who} failed on every completion of {batches} batches in a row: "
                f"{reason}. on_reward_error: drop leaves out single completions, not a function"
            )
        logger.warning(
            "%s: %d of %d completions left out (on_reward_error: drop), the first for data row %d: "
            "%s",
            *(who, len(lost), count, batch.rows[i], reason),
        )

    def _free_name(self, metric: str) -> str:
        """The name under which a metric of a function's own is logged: not one of the run's."""
        if not is_own_metric(metric):
            return metric
        if metric not in self._renamed:
            self._renamed.add(metric)
            logger.warning(
                "log_metric(%r, ...): that is a metric of the run itself; the reward function's "
                "is logged as %s",
                *(metric, USER_METRIC + metric),
            )
        return USER_METRIC + metric

    def _collect(self, batch: Batch, replies: list[Reply], dropped: int) -> RewardBatch:
        values = torch.tensor([reply.values for reply in replies], dtype=torch.float32).T
        unscored = values.isnan().all(dim=1)
        total = (values * self.weights).nansum(dim=1).masked_fill(unscored, math.nan)
        if unscored.any() and not self._said_unscored:
            self._said_unscored = True
            first = int(unscored.int().argmax())
            logger.warning(
                "%d of %d completions got no reward from any function (%s), the first for data "
                "row %d: they do not count and their advantage is 0%s",
                *(int(unscored.sum()), len(batch), ", ".join(self.names), batch.rows[first]),
                _why_none(batch, first, replies),
            )
        seconds: dict[str, float] = {}
        extra: dict[str, list[Any]] = {}
        logged: dict[str, list[float]] = {}
        for name, reply in zip(self.names, replies, strict=True):
            seconds[name] = seconds.get(name, 0.0) + reply.seconds
            extra.update(hide_known(reply.extra))
            for metric, numbers in reply.metrics.items():
                logged.setdefault(metric, []).extend(numbers)
        metrics = {
            self._free_name(name): sum(numbers) / len(numbers) for name, numbers in logged.items()
        }
        return RewardBatch(values.contiguous(), total, seconds, extra, metrics, dropped)


def _why_none(batch: Batch, index: int, replies: Sequence[Reply]) -> str:
    """More of a completion without rewards; nothing where a failure of a function was said."""
    if any(index in reply.failures for reply in replies):
        return ""
    given = {"prompts": batch.prompts[index], "completions": batch.completions[index]}
    given |= {name: values[index] for name, values in batch.columns.items()}
    return f". All reward functions returned None for the following kwargs: {brief(given)}"


def _mean_of(metric: str, parts: Sequence[RewardBatch]) -> float:
    own = [(part.metrics[metric], len(part.total)) for part in parts if metric in part.metrics]
    return sum(value * count for value, count in own) / max(sum(count for _, count in own), 1)
