"""Scorers of completions, wherever they run, and a batch that several are scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

from fusedgrpo.engine.rewards.call import Batch, CallFailed, Reply
from fusedgrpo.errors import RewardError

T = TypeVar("T")


class Scorer(Protocol):
    """A reward function, wherever it runs. All are started before any is waited for."""

    name: str

    def start(self, batch: Batch) -> None: ...
    def finish(self) -> Reply: ...
    def close(self) -> None: ...


@runtime_checkable
class Background(Protocol):
    """A scorer that works on a batch between ``start`` and ``finish``, and takes nothing from the
    trainer's process for it. over: whether ``finish`` has nothing to wait for."""

    def over(self) -> bool: ...


# None for one that is at work.
Outcome = Reply | CallFailed | RewardError | None


class Scoring(Generic[T]):
    """A batch that ``scorers`` are scoring. replied: makes the rewards of what came out."""

    def __init__(
        self,
        scorers: Sequence[Scorer],
        batch: Batch,
        replied: Callable[[Batch, Sequence[Reply | CallFailed]], T],
    ):
        self._scorers = scorers
        self._batch = batch
        self._replied = replied
        # Functions of this process begin where they end, so that nothing happens between.
        self._outcomes: list[Outcome] | None = None
        if all(isinstance(scorer, Background) for scorer in scorers):
            self._outcomes = started(scorers, batch)

    @property
    def over(self) -> bool:
        """Whether ``finish`` waits for no other process."""
        if self._outcomes is None:
            return True
        return all(
            outcome is not None or (isinstance(scorer, Background) and scorer.over())
            for scorer, outcome in zip(self._scorers, self._outcomes, strict=True)
        )

    def finish(self) -> T:
        """The rewards. Raises as ``RewardFunctions.score`` does."""
        if self._outcomes is None:
            self._outcomes = started(self._scorers, self._batch)
        return self._replied(self._batch, finished(self._scorers, self._outcomes))


def started(scorers: Sequence[Scorer], batch: Batch) -> list[Outcome]:
    """Have all ``scorers`` begin with ``batch``, to be at work at the same time where they can."""
    outcomes: list[Outcome] = []
    for scorer in scorers:
        try:
            scorer.start(batch)
            outcomes.append(None)
        except (CallFailed, RewardError) as failure:
            outcomes.append(failure)
    return outcomes


def finished(scorers: Sequence[Scorer], outcomes: list[Outcome]) -> list[Reply | CallFailed]:
    """Every one that was started is waited for before a RewardError is raised, so that no reply is
    left over for the next batch."""
    for index, scorer in enumerate(scorers):
        if outcomes[index] is None:
            try:
                outcomes[index] = scorer.finish()
            except (CallFailed, RewardError) as failure:
                outcomes[index] = failure
    done: list[Reply | CallFailed] = []
    for outcome in outcomes:
        if isinstance(outcome, RewardError):
            raise outcome
        assert outcome is not None
        done.append(outcome)
    return done
