"""``metrics.jsonl``: one JSON object per optimizer step, the truth about a run.

Trackers, plots and the report are drawn from these rows. Names are TRL's where TRL has the metric.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from types import TracebackType
from typing import Any

logger = logging.getLogger("fusedgrpo")

Row = Mapping[str, Any]


def finite(value: Any) -> float | None:
    """``value`` as a float, or None where it is no finite number."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    return None


def series(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows in which ``key`` is a finite number."""
    points = [(int(row["step"]), v) for row in rows if (v := finite(row.get(key))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def reward_names(rows: Iterable[Row]) -> list[str]:
    """The reward functions that appear as ``rewards/{name}/mean``, in order of appearance."""
    names: dict[str, None] = {}
    for row in rows:
        for key in row:
            if key.startswith("rewards/") and key.endswith("/mean"):
                names[key[len("rewards/") : -len("/mean")]] = None
    return list(names)


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
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif line.strip():
                logger.warning("%s:%d is no JSON object and is left out", path, number)
    return rows


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``; nulls (NaN when they were written) come back as None."""
    return [row for row in read_jsonl(path) if isinstance(row.get("step"), int)]


class MetricsLog:
    """Appends rows to ``path``; every row is on disk, as far as the process goes, on return."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write one row; it must have ``step``. NaN and infinities become null."""
        if "step" not in row:
            raise KeyError(f"a row of metrics needs 'step'; it has {sorted(row)}")
        self._file.write(to_json_line(row))
        self._file.flush()

    def truncate_after(self, step: int) -> int:
        """Drop the rows of later steps, which a resumed run is going to write again.

        They are kept in ``metrics.dropped.jsonl`` beside the file. Returns how many there were.
        """
        rows = read_metrics(self.path)
        dropped = [row for row in rows if row["step"] > step]
        with self.path.with_name("metrics.dropped.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(map(to_json_line, dropped))
        kept = self.path.with_name(f".{self.path.name}.tmp")
        with kept.open("w", encoding="utf-8") as file:
            file.writelines(to_json_line(row) for row in rows if row["step"] <= step)
        self._file.close()
        os.replace(kept, self.path)
        self._file = self.path.open("a", encoding="utf-8")
        return len(dropped)

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
