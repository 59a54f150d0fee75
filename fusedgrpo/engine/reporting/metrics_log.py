"""``metrics.jsonl``: one JSON object per optimizer step, the truth about a run.

Trackers, plots and the report are drawn from these rows. Names are TRL's where TRL has the metric.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from types import TracebackType
from typing import Any

logger = logging.getLogger("fusedgrpo")

Row = Mapping[str, Any]


_MOST = 1e150  # what is beyond has no square, and comes from no float32


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is no number that one can count with: NaN, infinite or
    beyond 1e150."""
    if isinstance(value, (int, float)) and abs(value) <= _MOST:
        return float(value)
    return None


def series(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows in which ``key`` is a finite number."""
    points = [(int(row["step"]), v) for row in rows if (v := finite(row.get(key))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def reward_names(rows: Iterable[Row]) -> list[str]:
    """The reward functions that appear as ``rewards/{name}/mean``, in order of appearance."""
    keys: dict[str, None] = {}
    for row in rows:
        keys |= dict.fromkeys(row)  # most rows have the same
    return [
        key[len("rewards/") : -len("/mean")]
        for key in keys
        if key.startswith("rewards/") and key.endswith("/mean")
    ]


def to_jsonable(value: Any) -> Any:
    """``value`` with tensors and arrays as numbers or lists, and NaN and infinities as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json_line(row: Row) -> str:
    """``row`` as one line of strict JSON; what JSON cannot say is written as ``str(value)``."""
    return json.dumps(to_jsonable(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a line that a crash tore is left out with a warning."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # torn; a number, or a nesting, beyond all bounds
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                logger.warning("%s:%d is no JSON object and is left out", path, number)
    return rows


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``; nulls (NaN when they were written) come back as None."""
    return [row for row in read_jsonl(path) if _is_step(row.get("step"))]


def _is_step(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**53  # of which every one is a number to a browser


class MetricsLog:
    """Appends rows to ``path``; every row is with the system when ``append`` returns, and on the
    disk after ``sync``. A row that could not be written whole is taken back, to be tried again.

    unsynced: the rows since the last ``sync``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.unsynced: list[Row] = []
        self._open()

    def _open(self) -> None:
        self._real = Path(os.path.realpath(self.path))  # a link stays one when it is replaced
        self._file = self._real.open("ab", buffering=0)
        self._end = self._file.seek(0, os.SEEK_END)

    def append(self, row: Row) -> None:
        """Write one row; it must have ``step``. NaN and infinities become null. Raises OSError."""
        if "step" not in row:
            raise KeyError(f"a row of metrics needs 'step'; it has {sorted(row)}")
        self._find_again()
        if os.fstat(self._file.fileno()).st_size > self._end:
            self._file.truncate(self._end)  # what a failed write has left
        left = memoryview(to_json_line(row).encode("utf-8", errors="replace"))
        while left:
            left = left[self._file.write(left) :]
        self._end = self._file.seek(0, os.SEEK_END)
        self.unsynced.append(row)

    def sync(self) -> None:
        """Wait until all rows are on the disk. Raises OSError."""
        os.fsync(self._file.fileno())
        self.unsynced.clear()

    def _find_again(self) -> None:
        """Make the file anew if it was deleted behind our back."""
        own = os.fstat(self._file.fileno())
        with contextlib.suppress(FileNotFoundError):
            there = self._real.stat()
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                return
        logger.warning("%s was deleted or replaced: its earlier rows are missing.", self.path)
        self._file.close()
        self._open()

    def resume(self, step: int, again: Iterable[Row] = ()) -> list[str]:
        """Make the file that of a run which has done ``step`` steps; returns what there is to say.

        Rows of later steps, which are going to be written again, and whatever else has no place in
        the file are kept in ``metrics.dropped.jsonl`` beside it. again: rows that the checkpoint
        holds, in the place of those of the same step.
        """
        said = []
        rows, dropped, torn = self._sorted_out()
        # Step 0 is the evaluation before the first step.
        later: list[Row] = [row for row in rows if not 0 <= row["step"] <= step]
        if later:
            said.append(
                f"{self.path.name} had {len(later)} rows of steps after step {step}: they are in "
                "metrics.dropped.jsonl now."
            )
        if torn:
            said.append(
                f"{torn} lines of {self.path.name} are no rows; they are in metrics.dropped.jsonl "
                "now."
            )
        kept: dict[int, Row] = {}
        repeated = []
        for row in rows:
            if row["step"] in kept:
                dropped.append(kept[row["step"]])
                repeated.append(row["step"])
            if 0 <= row["step"] <= step:
                kept[row["step"]] = row
        if repeated:
            said.append(
                f"{self.path.name} had more than one row of {steps_in_words(repeated)}: the last "
                "of each is kept, the others are in metrics.dropped.jsonl now."
            )
        order = list(kept)
        if order != sorted(order):
            said.append(f"The rows of {self.path.name} were not in order; they are now.")
        kept |= {row["step"]: row for row in again}
        missing = [number for number in range(1, step + 1) if number not in kept]
        if missing:
            said.append(
                f"{self.path.name} has no row of {steps_in_words(missing)}, though "
                f"{'it was' if len(missing) == 1 else 'they were'} done: plots and report go "
                "without."
            )
        self._rewrite([kept[number] for number in sorted(kept)], dropped + later)
        return said

    def _sorted_out(self) -> tuple[list[dict[str, Any]], list[Row], int]:
        """The rows of the file; what else it holds, so that it can be kept; how much that is."""
        rows: list[dict[str, Any]] = []
        other: list[Row] = []
        with self._real.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict) and type(row.get("step")) is int:
                    rows.append(row)
                elif line.strip("\0 \n"):
                    other.append({"line": line})
        return rows, other, len(other)

    def _rewrite(self, rows: Sequence[Row], dropped: Sequence[Row]) -> None:
        if dropped:
            beside = self.path.with_name("metrics.dropped.jsonl")
            with beside.open("a", encoding="utf-8", errors="replace") as file:
                file.writelines(map(to_json_line, dropped))
                file.flush()
                os.fsync(file.fileno())
        kept = self._real.with_name(f".{self._real.name}.tmp")
        with kept.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(map(to_json_line, rows))
            file.flush()
            os.fsync(file.fileno())
        self._file.close()
        os.replace(kept, self._real)
        self._open()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def steps_in_words(steps: Iterable[int]) -> str:
    """``step 3`` or ``steps 1-4, 7``."""
    runs: list[list[int]] = []
    for step in sorted(set(steps)):
        if runs and runs[-1][1] == step - 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"step {words}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"steps {words}"


@dataclass(frozen=True, slots=True)
class Trend:
    """First against last window of a noisy series.

    first, last: means of the first and last ``window`` values.
    noise: standard error of ``last - first``, from the spread inside the two windows (a slope
        inside a window counts as noise, so the estimate errs on the cautious side).
    """

    window: int
    first: float
    last: float
    noise: float

    @property
    def change(self) -> float:
        return self.last - self.first

    @property
    def rose(self) -> bool:
        """The change is positive and more than twice its noise."""
        return self.change > 2 * self.noise

    @property
    def fell(self) -> bool:
        return -self.change > 2 * self.noise


def trend(values: list[float]) -> Trend | None:
    """Compare the ends of ``values``: a tenth of them, at least 5; None for fewer than 10."""
    window = max(5, len(values) // 10)
    if len(values) < 2 * window:
        return None
    first, last = values[:window], values[-window:]
    noise = math.sqrt((variance(first) + variance(last)) / window)
    return Trend(window, fmean(first), fmean(last), noise)


def rollout_rows(rows: Iterable[Row]) -> list[Row]:
    """The rows whose step sampled: the others repeat the rewards and lengths of their rollout."""
    return [
        row for row in rows if finite(row.get("reward")) is not None and row.get("time/sample", 1)
    ]


def mean_row(rows: Iterable[Row]) -> dict[str, float]:
    """The mean of every key over the rows that have it as a finite number."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if (v := finite(value)) is not None:
                columns.setdefault(key, []).append(v)
    return {key: fmean(values) for key, values in columns.items()}
