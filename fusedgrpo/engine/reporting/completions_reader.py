"""The completions of a run as they were logged: whole records of a step, or the scores of all."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting.completions_log import steps_in
from fusedgrpo.engine.reporting.completions_parquet import (
    ERRORS,
    REWARDS,
    StepsFile,
    files_in,
    whole,
)
from fusedgrpo.engine.reporting.metrics_log import finite, read_jsonl

logger = logging.getLogger("fusedgrpo")

_WHOLE = ("step", "group", "row", "length")
_REAL = ("reward", "advantage")


@dataclass(frozen=True)
class Scores:
    """The numbers of completions, without their texts: arrays of ``[B]``, in order of steps.

    step: whose rollout; group: its number in the rollout; row: of the data; length: tokens; cut:
    ended by the limit; reward: their weighted sum, NaN where there is none; advantage: NaN where a
    completion has none; parts: by reward function, NaN where it does not apply.
    """

    step: np.ndarray
    group: np.ndarray
    row: np.ndarray
    length: np.ndarray
    cut: np.ndarray
    reward: np.ndarray
    advantage: np.ndarray
    parts: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step)


def scores_from(records: Iterable[Mapping[str, Any]]) -> Scores:
    """The scores of records as they are logged, each with its ``step``."""
    records = list(records)
    rewards = [record.get("rewards") for record in records]
    given: list[dict[str, Any]] = [each if isinstance(each, dict) else {} for each in rewards]
    names = dict.fromkeys(name for each in given for name in each)

    def integers(key: str) -> np.ndarray:
        return np.asarray([whole(record.get(key)) or 0 for record in records], dtype=np.int64)

    def real(values: Iterable[Any]) -> np.ndarray:
        found = [finite(value) for value in values]
        return np.asarray([np.nan if v is None else v for v in found], dtype=float)

    return Scores(
        step=integers("step"),
        group=integers("group"),
        row=integers("row"),
        length=integers("length"),
        cut=np.asarray([record.get("finish_reason") == "length" for record in records], dtype=bool),
        reward=real(record.get("reward") for record in records),
        advantage=real(record.get("advantage") for record in records),
        parts={name: real(each.get(name) for each in given) for name in names},
    )


class Completions:
    """A folder of logged completions; one that is not there has none. What is no file of ours, or
    torn, is left out with a warning."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    @cached_property
    def _places(self) -> dict[int, Path | StepsFile]:
        """By step, in order, the file that it is read from."""
        places: dict[int, Path | StepsFile] = {}
        places |= steps_in(self.directory)  # first: what is folded meanwhile is in both
        places |= {step: file for file in files_in(self.directory) for step in file.steps}
        return dict(sorted(places.items()))

    @property
    def steps(self) -> list[int]:
        """The steps that there are completions of, in order."""
        return list(self._places)

    def read(self, step: int) -> list[dict[str, Any]]:
        """The records of a step of ``steps``, as they were logged."""
        try:
            return self._read(step)
        except FileNotFoundError:
            self._places = Completions(self.directory)._places  # the run goes on, and folded it
            return self._read(step)

    def _read(self, step: int) -> list[dict[str, Any]]:
        place = self._places[step]
        if isinstance(place, Path):
            return read_jsonl(place)
        try:
            return place.read(step)
        except FileNotFoundError:
            raise
        except ERRORS as error:
            logger.warning("%s: step %d is left out: %s", place.path, step, error)
            return []

    @cached_property
    def scores(self) -> Scores:
        """The scores of all steps."""
        folded: dict[StepsFile, list[int]] = {}
        found = [scores_from([])]
        for step, place in list(self._places.items()):
            if isinstance(place, StepsFile):
                folded.setdefault(place, []).append(step)
            else:
                found.append(scores_from({**record, "step": step} for record in self.read(step)))
        for file, steps in folded.items():
            try:
                found.append(_scores_in(file, steps))
            except ERRORS as error:
                logger.warning("%s is left out: %s", file.path, error)
        return _joined(sorted(found, key=lambda scores: scores.step[:1].tolist()))


def _scores_in(file: StepsFile, steps: Sequence[int]) -> Scores:
    """The scores of some steps of a file. Raises one of ``ERRORS``."""
    rewards = {name: REWARDS + name for name in file.reward_names}
    columns = [*_WHOLE, *_REAL, "finish_reason", *rewards.values()]
    table = file.table(steps, columns)

    def column(name: str, missing: Any) -> np.ndarray:
        if name not in table.column_names:
            return np.full(len(table), missing)
        return table[name].fill_null(missing).to_numpy()

    return Scores(
        **{name: column(name, 0) for name in _WHOLE},
        **{name: column(name, np.nan) for name in _REAL},
        cut=column("finish_reason", "") == "length",
        parts={name: column(key, np.nan) for name, key in rewards.items()},
    )


def _joined(pieces: Sequence[Scores]) -> Scores:
    """One of several, in order of steps."""
    names = dict.fromkeys(name for piece in pieces for name in piece.parts)
    order = np.argsort(np.concatenate([piece.step for piece in pieces]), kind="stable")

    def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))[order]

    def part(name: str) -> np.ndarray:
        missing = (np.full(len(piece), np.nan) for piece in pieces)
        return joined(p.parts.get(name, nan) for p, nan in zip(pieces, missing, strict=True))

    return Scores(
        **{
            name: joined(getattr(piece, name) for piece in pieces)
            for name in (*_WHOLE, *_REAL, "cut")
        },
        parts={name: part(name) for name in names},
    )
