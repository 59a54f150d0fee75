"""A folder of completions that stays small in files: of every 64 steps one Parquet file is made."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fusedgrpo.engine.checkpoint_files import why_not_written
from fusedgrpo.engine.reporting import completions_parquet as parquet
from fusedgrpo.engine.reporting.completions_log import CompletionsLog
from fusedgrpo.errors import reason

FOLDED = 64  # steps of a file; a run of 10,000 rollouts has 157 files and up to 63 loose ones


class FoldingLog(CompletionsLog):
    """A ``CompletionsLog`` whose files are folded. Whatever stops it at whatever point, each record
    is in a complete file: a Parquet file is there before the files of its steps are deleted, and
    what is in both counts once, as the Parquet file has it."""

    def __init__(self, directory: str | Path):
        super().__init__(directory)
        self._due = FOLDED
        self._unfit: set[int] = set()

    def fold_if_due(self) -> str | None:
        """Fold if there are enough loose files; returns what there is to say. Where it fails,
        nothing is lost, and it is tried again when there are as many more."""
        loose = len(self.loose.keys() - self._unfit)
        if loose < self._due:
            return None
        try:
            self._fold()
        except parquet.ERRORS as error:
            self._due = loose + FOLDED
            return (
                f"{self.directory}: {loose} files could not be made into one "
                f"({why_not_written(error) or reason(error)}). "
                f"They stay as they are; tried again after {FOLDED} more."
            )
        self._due = FOLDED
        return None

    def _fold(self) -> None:
        for unfinished in self.directory.glob(".steps-*.tmp"):
            unfinished.unlink()
        loose = self.loose
        for file in parquet.files_in(self.directory):
            for step in file.steps:
                if step in loose:  # the end of an earlier fold that was stopped
                    loose.pop(step).unlink()
        self._unfit = {step for step, path in loose.items() if _records(path) is None}
        steps = [step for step in loose if step not in self._unfit]
        for start in range(0, len(steps) - FOLDED + 1, FOLDED):
            part = steps[start : start + FOLDED]
            target = self.directory / parquet.name_of(part)
            if target.exists():
                raise FileExistsError(f"{target} is there, and is not of these steps")
            parquet.write(target, part, lambda step: _records(loose[step]) or [])
            for step in part:
                loose[step].unlink()

    def _steps(self) -> Iterable[int]:
        folded = (step for file in parquet.files_in(self.directory) for step in file.steps)
        return {*folded, *self.loose}

    def _move_after(self, step: int, aside: Path) -> None:
        for file in parquet.files_in(self.directory):
            if file.steps[-1] > step:
                _cut(file, step, aside)
        super()._move_after(step, aside)


def _cut(file: parquet.StepsFile, step: int, aside: Path) -> None:
    """Leave the steps until ``step`` in ``file``, under a name that fits, and put the others into
    a file of the folder ``aside``: which is there before they are gone. A file that cannot be read
    is put there whole."""
    kept = [number for number in file.steps if number <= step]
    if not kept or not file.is_readable():
        file.path.rename(aside / file.path.name)
        return
    gone = [number for number in file.steps if number > step]
    parquet.write(aside / parquet.name_of(gone), gone, file.read)
    parquet.write(file.path, kept, file.read)
    os.rename(file.path, file.path.with_name(parquet.name_of(kept)))


def _records(path: Path) -> list[dict[str, Any]] | None:
    """None where a line is no record: such a file is no work of ours, and is not folded, so that
    the line stays."""
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return None
            if not isinstance(record, dict):
                return None
            records.append(record)
    return records
