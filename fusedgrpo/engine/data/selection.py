"""Which prompts come next, by what is known of them: those that promise signal, or a curriculum.

``prompt_selection: informative`` draws a prompt by how far the rewards of its groups were apart
when it was last asked: what every completion gets right, or none, teaches nothing (DAPO, arXiv
2503.14476, leaves such groups out after they were sampled; here they are asked for less often).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.data.stream import PromptStream
from fusedgrpo.engine.seeding import derive, seeded
from fusedgrpo.errors import ConfigError, DataError, brief
from fusedgrpo.named_code import load_code, locate_code

FLOOR = 0.1  # of the weight of the most promising prompt, which every prompt has
PRIOR = 2.0  # groups of the typical spread that every prompt begins with
NEW = 0.3  # weight of the last group in a prompt's running means
STARVED = 4  # passes' worth of draws that a prompt waits at most
EASY = 0.2  # share of the prompts that a curriculum begins with; it has all from half of the run on

# (what is known of the prompts, share of the run that is over) -> weights [P]
Weigh = Callable[["Known", float], np.ndarray]


class Known:
    """The past of a run's prompts: arrays of ``[P]``, in the order of the data.

    seen: groups. mean, spread: running means of the rewards of its groups and of their standard
    deviation, 0 where none was seen. last: the number of prompts that were handed out before its
    last group, -1 for none.
    """

    ARRAYS = ("seen", "mean", "spread", "last")

    def __init__(self, data: PromptDataset):
        self.data = data
        self.seen = np.zeros(len(data), dtype=np.int64)
        self.mean = np.zeros(len(data))
        self.spread = np.zeros(len(data))
        self.last = np.full(len(data), -1, dtype=np.int64)

    def add(self, place: int, position: int, rewards: np.ndarray) -> None:
        """A group of the prompt at ``place`` of the data, the ``position``-th that was handed out.
        rewards: ``[G]``, NaN where there is none."""
        self.last[place] = position
        rewards = rewards[~np.isnan(rewards)]
        if not len(rewards):
            return
        new = NEW if self.seen[place] else 1.0
        self.seen[place] += 1
        for values, value in ((self.mean, rewards.mean()), (self.spread, rewards.std())):
            values[place] += new * (value - values[place])

    def state(self) -> dict[str, Any]:
        """All about prompts that were handed out, for JSON."""
        places = np.flatnonzero(self.last >= 0)
        return {"data": self.data.fingerprint, "places": places.tolist()} | {
            name: getattr(self, name)[places].tolist() for name in self.ARRAYS
        }

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of ``state``; of other data, and of None, nothing is known."""
        known = state if state and state["data"] == self.data.fingerprint else None
        for name in self.ARRAYS:
            values = getattr(self, name)
            values[:] = -1 if name == "last" else 0
            if known:
                values[known["places"]] = known[name]


def informative(known: Known, share: float) -> np.ndarray:
    """The spread that is expected of a prompt's next group, against the greatest one; a prompt that
    was not tried yet promises as much as the best, one that nothing could judge promises nothing.

    One group says little: expected is the mean of what its groups had and of ``PRIOR`` typical
    ones. So where most prompts teach, none is asked much more often than others, which would narrow
    the policy to their answers (docs/measured.md); where few do, those are.
    """
    seen = known.seen > 0
    promise = np.zeros(len(seen))
    if seen.any():
        groups = np.minimum(known.seen[seen], (2 - NEW) / NEW)  # as sure as the mean of so many
        spread = known.spread[seen]
        promise[seen] = (PRIOR * spread.mean() + groups * spread) / (PRIOR + groups)
    top = promise.max(initial=0.0)
    if top > 0:
        promise /= top
    promise[known.last < 0] = 1.0
    return FLOOR + (1 - FLOOR) * promise


class Curriculum:
    """From the prompts with the least value of ``column`` to all of them: ``EASY`` of the data at
    first, more from step to step, all from half of the run on. Raises DataError."""

    def __init__(self, data: PromptDataset, column: str):
        values = [example.columns.get(column) for example in data.examples]
        for example, value in zip(data.examples, values, strict=True):
            if isinstance(value, bool) or not isinstance(value, Real) or value != value:
                raise DataError(
                    f"prompt_selection: column {column!r} of row {example.row} has {brief(value)}: "
                    "expected a number in every row, the easiest prompts the lowest."
                )
        order = np.argsort(np.asarray(values, dtype=float), kind="stable")
        self.rank = np.empty(len(values), dtype=np.int64)
        self.rank[order] = np.arange(len(values))

    def __call__(self, known: Known, share: float) -> np.ndarray:
        open_to = EASY + (1 - EASY) * min(2 * share, 1.0)
        return (self.rank < max(1, round(open_to * len(self.rank)))).astype(float)


class OwnWeights:
    """The user's ``function(mean=, spread=, seen=, rows=, progress=)``: weights of the prompts.
    Raises ConfigError for anything else than ``[P]`` numbers of which some are above 0."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self.function = function

    def __call__(self, known: Known, share: float) -> np.ndarray:
        who = f"prompt_selection {self.name!r}"
        try:
            given = self.function(
                mean=np.where(known.seen > 0, known.mean, np.nan),
                spread=np.where(known.seen > 0, known.spread, np.nan),
                seen=known.seen.copy(),
                rows=[example.columns for example in known.data.examples],
                progress=share,
            )
            weights = np.asarray(given, dtype=float)
        except Exception as error:  # the user's code raises anything
            raise ConfigError(f"{who} raised {type(error).__name__}: {error}") from error
        usable = weights.shape == known.mean.shape and np.isfinite(weights).all()
        if not usable or (weights < 0).any() or not weights.any():
            raise ConfigError(
                f"{who} returned {brief(given)}: expected a weight >= 0 for each of the "
                f"{len(known.mean)} prompts, some of them above 0."
            )
        return weights


class SelectedStream(PromptStream):
    """Prompts drawn by weight; in one rollout none twice before all that may come have come.

    keeps_up: a prompt that has waited for ``STARVED`` passes' worth of draws comes first.
    """

    def __init__(self, data: PromptDataset, *, seed: int, weigh: Weigh, keeps_up: bool):
        super().__init__(data, seed=seed, shuffle=True)
        self.weigh = weigh
        self.keeps_up = keeps_up
        self.known = Known(data)
        self._places = {example.row: i for i, example in enumerate(data.examples)}
        self._ranked: tuple[tuple[int, int], np.ndarray] | None = None

    def peek(self, count: int) -> list[Example]:
        """See ``PromptStream``: more of them begin with the same ones."""
        found: list[Example] = []
        turn = 0
        while len(found) < count:
            found += [self.data[i] for i in self._ranking(turn)[: count - len(found)]]
            turn += 1
        return found

    def observe(self, examples: Sequence[Example], rewards: np.ndarray) -> None:
        """The next prompts were handed out, and what their groups got, ``[P, G]``. Call it before
        the cursor moves."""
        for i, (example, of_group) in enumerate(zip(examples, rewards, strict=True)):
            self.known.add(self._places[example.row], self.cursor + i, of_group)
        self._ranked = None

    def state(self) -> dict[str, Any] | None:
        return self.known.state()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        self._ranked = None
        self.known.restore(state)

    def metrics(self) -> dict[str, float]:
        """coverage: share of the prompts that were among the last P handed out; seen: among all;
        spread: mean of what is known of those that were seen."""
        known, count = self.known, len(self.data)
        was = known.seen > 0
        return {
            "selection/coverage": float((known.last >= max(self.cursor - count, 0)).mean()),
            "selection/seen": float((known.last >= 0).mean()),
            "selection/spread": float(known.spread[was].mean()) if was.any() else 0.0,
        }

    def _ranking(self, turn: int) -> np.ndarray:
        """Places of all prompts that may come, in their order: a draw without replacement by
        weight, as the greatest of log(weight) + Gumbel noise (Efraimidis and Spirakis, 2006)."""
        key = (self.cursor, turn)
        if self._ranked is None or self._ranked[0] != key:
            with seeded(derive(self.seed, "weigh", *key)):  # the user's code may draw
                weights = self.weigh(self.known, self.share)
            draw = np.random.Generator(np.random.Philox(derive(self.seed, "select", *key)))
            with np.errstate(divide="ignore"):
                keys = np.log(weights) + draw.gumbel(size=len(weights))
            waited = np.zeros(len(weights), dtype=np.int64)
            if self.keeps_up and turn == 0:
                waited = self.cursor - self.known.last
                waited[waited <= STARVED * len(weights)] = 0
            order = np.lexsort((-keys, -waited))  # who has waited for too long, whatever the draw
            self._ranked = key, order[: int(np.isfinite(keys[order]).sum())]
        return self._ranked[1]


def find_selection(option: str, data: PromptDataset, folders: Sequence[Path]) -> Weigh:
    """The weights that the option ``prompt_selection`` names, other than uniform ones. Raises
    ConfigError, DataError."""
    if option == "informative":
        return informative
    if option.startswith("column:"):
        return Curriculum(data, option.removeprefix("column:").strip())
    code = locate_code(option, folders, "prompt_selection", ConfigError)
    assert code is not None  # config/rules.py
    return OwnWeights(option, load_code(code, "prompt_selection", ConfigError))
