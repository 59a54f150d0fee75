"""Records of many steps in one Parquet file, ``steps-NNNNNN-NNNNNN.parquet``, a row group a step.

Columns are for people: what is a number or a text in a record is one here, ``rewards/NAME`` is what
a function gave, ``prompt`` is a text also where it was messages. Three columns of JSON have what a
table cannot say, so that a record comes back as it was: ``messages`` (a prompt of them), ``extra``,
and ``rest``: keys that are in none of the columns, and values that are not what theirs holds.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fusedgrpo.engine.checkpoint_files import sync
from fusedgrpo.engine.reporting.completions_log import prompt_text
from fusedgrpo.engine.reporting.metrics_log import finite

logger = logging.getLogger("fusedgrpo")

Records = Sequence[Mapping[str, Any]]

COLUMNS: dict[str, type] = {
    "step": int, "set": str, "group": int, "row": int, "prompt": str, "completion": str,
    "finish_reason": str, "length": int, "reward": float, "advantage": float,
}  # fmt: skip
REWARDS = "rewards/"  # before the name of a function
JSON = ("messages", "extra", "rest")
# What may be wrong with a file, or with the disk.
ERRORS = (OSError, pa.ArrowException)

_TYPES = {int: pa.int64(), float: pa.float64(), str: pa.string()}
_STEPS = b"fusedgrpo.steps"  # in the footer: whose row groups these are


def whole(value: Any) -> int | None:
    """``value`` as an integer of 64 bits, or None where it is no such number."""
    number = finite(value)
    return int(number) if number is not None and abs(number) < 2**63 else None


@dataclass(frozen=True)
class StepsFile:
    """A file of folded steps; ``steps`` are those of its row groups."""

    path: Path
    steps: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> StepsFile:
        """Raises one of ``ERRORS`` if that is none."""
        footer = pq.read_metadata(path)
        said = (footer.metadata or {}).get(_STEPS)
        steps = tuple(json.loads(said)) if said else ()
        if not steps or len(steps) != footer.num_row_groups:
            raise pa.ArrowInvalid("it does not say which steps it has")
        return cls(path, steps)

    def read(self, step: int) -> list[dict[str, Any]]:
        """The records of one of ``steps``. Raises one of ``ERRORS``."""
        return [_record(row) for row in self.table([step]).to_pylist()]

    def table(self, steps: Iterable[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of some of ``steps``, of these columns as far as there are such. Raises one of
        ``ERRORS``."""
        with pq.ParquetFile(self.path) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in names if name in columns]
            groups = [self.steps.index(step) for step in steps]
            table = file.read_row_groups(groups, columns=wanted, use_threads=False)
        return table.select(wanted)  # a dot in a name stands for a field of it, to the reader

    def is_readable(self) -> bool:
        """False, with a warning, if its rows cannot be read."""
        try:
            for step in self.steps:
                self.table([step])
        except ERRORS as error:
            logger.warning("%s cannot be read: %s", self.path, error)
            return False
        return True

    @property
    def reward_names(self) -> list[str]:
        names = pq.read_schema(self.path).names
        return [name.removeprefix(REWARDS) for name in names if name.startswith(REWARDS)]


def files_in(directory: Path) -> list[StepsFile]:
    """The files of folded steps in ``directory``; one that is none is left out with a warning."""
    found = []
    for path in sorted(directory.glob("steps-*.parquet")):
        try:
            found.append(StepsFile.open(path))
        except ERRORS as error:
            logger.warning("%s is left out: %s", path, error)
    return sorted(found, key=lambda file: file.steps)


def name_of(steps: Sequence[int]) -> str:
    """The name of the file of these steps."""
    return f"steps-{min(steps):06d}-{max(steps):06d}.parquet"


def write(path: Path, steps: Sequence[int], read: Callable[[int], Records]) -> None:
    """Write the records of ``steps``, which ``read`` gives, to a file that is complete or not
    there, and on the disk. They are read twice, so that one step at a time is in memory. Raises one
    of ``ERRORS``."""
    schema = _schema(steps, read)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            with pq.ParquetWriter(file, schema, compression="zstd") as writer:
                for step in steps:
                    rows = [_row(step, record) for record in read(step)]
                    table = pa.Table.from_pylist(rows, schema)
                    writer.write_table(table, row_group_size=max(len(rows), 1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # it may be what fills the disk
        raise
    sync(path.parent)


def _schema(steps: Sequence[int], read: Callable[[int], Records]) -> pa.Schema:
    """Fixed columns that any of the records has a key for, rewards in order of appearance, JSON."""
    keys = {"step": None}
    names: dict[str, None] = {}
    for step in steps:
        for record in read(step):
            keys |= dict.fromkeys(record)
            if isinstance(rewards := record.get("rewards"), dict):
                names |= dict.fromkeys(_columns_of(rewards))
    fixed = [pa.field(name, _TYPES[kind]) for name, kind in COLUMNS.items() if name in keys]
    parts = [pa.field(REWARDS + name, pa.float64()) for name in names]
    said = [pa.field(name, pa.string()) for name in JSON]
    return pa.schema([*fixed, *parts, *said], {_STEPS: json.dumps(list(steps))})


def _columns_of(rewards: Mapping[str, Any]) -> list[str]:
    """The names that a column can have."""
    return [name for name in rewards if _utf8(name) == name]


def _row(step: int, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record by column."""
    rest = dict(record)
    row: dict[str, Any] = {"step": step}
    for key, kind in COLUMNS.items():
        if key not in record:
            continue
        row[key] = step if key == "step" else _as(kind, record[key])
        if _same(row[key], record[key]):
            del rest[key]
    if isinstance(prompt := rest.get("prompt"), list):
        row["prompt"] = _utf8(_readable(prompt))
        row["messages"] = _json(rest.pop("prompt"))
    if "extra" in rest:
        row["extra"] = _json(rest.pop("extra"))
    if isinstance(rewards := record.get("rewards"), dict):
        parts = {name: finite(rewards[name]) for name in _columns_of(rewards)}
        row |= {REWARDS + name: value for name, value in parts.items()}
        rest["rewards"] = {k: v for k, v in rewards.items() if not _same(parts.get(k), v)}
        if rewards and not rest["rewards"]:
            del rest["rewards"]
    if rest:
        row["rest"] = _json(rest)
    return row


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``_row``."""
    record = {key: row[key] for key in COLUMNS if row.get(key) is not None}
    rest = json.loads(row.get("rest") or "{}")
    if row.get("messages") is not None:
        record["prompt"] = json.loads(row["messages"])
    odd = rest.get("rewards")
    odd = odd if isinstance(odd, dict) else {}
    given = {
        name: odd.pop(name) if name in odd else value
        for column, value in row.items()
        if column.startswith(REWARDS)
        and ((name := column.removeprefix(REWARDS)) in odd or value is not None)
    } | odd
    if given:
        rest["rewards"] = given
    if row.get("extra") is not None:
        record["extra"] = json.loads(row["extra"])
    return record | rest


def _as(kind: type, value: Any) -> int | float | str | None:
    """``value`` as a column of that kind holds it; None if it does not."""
    if kind is str:
        return _utf8(value) if isinstance(value, str) else None
    return whole(value) if kind is int else finite(value)


def _same(held: Any, value: Any) -> bool:
    return held is not None and type(held) is type(value) and held == value


def _readable(prompt: list[Any]) -> str:
    if all(isinstance(message, dict) for message in prompt):
        return prompt_text(prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if _utf8(text) == text else json.dumps(value)


def _utf8(text: str) -> str:
    """``text``, where half a surrogate pair, which UTF-8 cannot, is "?"."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
