"""The completions of a run as they were logged: whole records of a step, or the scores of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fusedgrpo.engine.reporting.completions_log import steps_in
from fusedgrpo.engine.reporting.metrics_log import finite, read_jsonl


@dataclass(frozen=True)
class Scores:
    """What completions got, without what they say: arrays of ``[B]``, in order of their steps.

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
    """Those of records as they are logged, each with its ``step``."""
    records = list(records)
    names = dict.fromkeys(name for record in records for name in record.get("rewards") or {})

    def whole(key: str) -> np.ndarray:
        return np.asarray([int(finite(record.get(key)) or 0) for record in records], dtype=np.int64)

    def real(values: Iterable[Any]) -> np.ndarray:
        found = [finite(value) for value in values]
        return np.asarray([np.nan if v is None else v for v in found], dtype=float)

    return Scores(
        step=whole("step"),
        group=whole("group"),
        row=whole("row"),
        length=whole("length"),
        cut=np.asarray([record.get("finish_reason") == "length" for record in records], dtype=bool),
        reward=real(record.get("reward") for record in records),
        advantage=real(record.get("advantage") for record in records),
        parts={
            name: real((record.get("rewards") or {}).get(name) for record in records)
            for name in names
        },
    )


class Completions:
    """A folder of logged completions; one that is not there has none."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    @cached_property
    def _files(self) -> dict[int, Path]:
        return steps_in(self.directory)

    @property
    def steps(self) -> list[int]:
        """The steps that there are completions of, in order."""
        return list(self._files)

    def read(self, step: int) -> list[dict[str, Any]]:
        """The records of a step of ``steps``, as they were logged."""
        return read_jsonl(self._files[step])

    @cached_property
    def scores(self) -> Scores:
        """Those of all steps."""
        return scores_from(record for step in self.steps for record in self.read(step))
