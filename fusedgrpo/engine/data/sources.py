"""Read the rows of a data set from wherever it is.

JSON, JSONL, CSV and Parquet files, directories written by ``Dataset.save_to_disk``, names in
LLaMA-Factory's ``dataset_info.json``, Hub names, ``datasets.Dataset`` and lists of dicts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedgrpo import stages, tasks
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.files import SUFFIXES, read_file
from fusedgrpo.engine.data.formats import Layout
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.engine.data.media import undecoded
from fusedgrpo.engine.data.registry import FILE_NAME, Entry, read_entry, read_registry
from fusedgrpo.engine.data.rows import Row, each_row, read_row
from fusedgrpo.errors import DataError, brief, did_you_mean, reason
from fusedgrpo.input_files import exists


@dataclass(frozen=True, slots=True)
class Source:
    """Rows and where they are from. layout: how to read them, if dataset_info.json says it."""

    name: str
    rows: list[Row]
    layout: Layout | None = None


def read_source(
    source: Any,
    dataset_dir: str | Path = "data",
    split: str = "train",
    formats: Formats | None = None,
) -> Source:
    """The rows of a data set given by name, path or object. ``split`` where there are several.
    formats: finds the format that an entry of dataset_info.json names.

    Raises DataError if it is not there or cannot be read.
    """
    if isinstance(source, (str, Path)):
        return _read_named(str(source), Path(dataset_dir), split, formats or Formats())
    try:
        for to_rows in ("to_pylist", "to_dicts"):  # tables of pyarrow and polars
            if hasattr(source, to_rows):
                source = getattr(source, to_rows)()
        if hasattr(source, "to_dict") and hasattr(source, "iloc"):  # a DataFrame of pandas
            source = source.to_dict("records")
    except Exception as error:  # values that the table's library cannot bring into Python
        kind = type(source).__name__
        raise DataError(f"The {kind} cannot be read row by row: {reason(error)}.") from error
    if isinstance(source, (list, tuple)):
        return Source("list", [read_row(f"row {i}", values) for i, values in enumerate(source)])
    if isinstance(source, Mapping):  # a DatasetDict
        return _read_object(_pick_split(source, split, "the data set"))
    if hasattr(source, "column_names") and hasattr(source, "__len__"):
        return _read_object(source)
    raise DataError(
        "A data set is a name, a path, a datasets.Dataset, a table of pandas, polars or pyarrow, "
        f"or a list of dicts, got {type(source).__name__}."
    )


def read_tasks(name: str, config: GRPOConfig, split: str, messages: bool) -> Source:
    """Questions of tasks, those of the split "test" from other seeds. Raises DataError."""
    with stages.stage(f"making questions of {name}", counted=False):
        rows = tasks.task_rows(
            name, config.task_options, held_out=split == "test", messages=messages
        )
    return Source(name, [read_row(f"question {i}", row) for i, row in enumerate(rows)])


def _read_named(name: str, directory: Path, split: str, formats: Formats) -> Source:
    """Registered in dataset_info.json, a path, a file in the data directory, or on the Hub."""
    registry = read_registry(directory)
    if name in registry:
        entry = read_entry(name, registry[name], directory, formats)
        return _read_registered(name, entry, split)
    try:
        given = Path(name).expanduser()
    except RuntimeError as error:  # ~user, and no such user
        raise DataError(f"Data set {brief(name)}: {reason(error)}.") from error
    named = [directory / f"{name}{suffix}" for suffix in ("", *SUFFIXES)]
    for path in (given, *named):
        if exists(path):
            return _read_path(path, split)
    if given.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        near: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            near = [str(p) for p in given.parent.glob("*") if p.suffix in SUFFIXES or p.is_dir()]
        raise DataError(f"Data set {brief(name)} does not exist.{did_you_mean(str(given), near)}")
    try:
        return _load_hub(name, None, split)
    except DataError as error:
        known = f", nor one of {', '.join(registry)} in its {FILE_NAME}" if registry else ""
        raise DataError(
            f"Data set {brief(name)} is neither a path nor {directory / _label(name)}"
            f"[{'|'.join(SUFFIXES)}]"
            f"{known}.{did_you_mean(name, registry)} {error}"
        ) from error.__cause__


def _label(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


def _read_path(path: Path, split: str) -> Source:
    if path.is_dir():
        return _read_object(_load_directory(path, split), str(path))
    with stages.stage(f"reading {path}", counted=True):
        return Source(str(path), list(stages.count(read_file(path), "rows")))


def _read_object(dataset: Any, name: str = "dataset") -> Source:
    try:
        dataset, count = undecoded(dataset), len(dataset)
    except Exception as error:  # a class of somebody's own, or a damaged cache
        raise DataError(f"{name}: cannot be read: {reason(error)}.") from error
    rows = each_row(name, count, lambda: dataset, lambda i: dataset[i])
    with stages.stage(f"reading {name}", counted=True):
        return Source(name, list(stages.count(rows, "rows", count)))


def _load_directory(path: Path, split: str) -> Any:
    import datasets

    if not any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        files: list[str] = []
        with contextlib.suppress(OSError):  # a directory that we may not look into
            files = sorted(p.name for p in path.iterdir())[:10]
        raise DataError(
            f"{path}: not a directory written by Dataset.save_to_disk; name one of its files: "
            f"{', '.join(files) or 'it is empty'}."
        )
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged JSON, Arrow and whatever comes of them
        raise DataError(f"{path}: cannot be loaded: {reason(error)}") from error
    return _pick_split(dataset, split, str(path)) if isinstance(dataset, Mapping) else dataset


def _load_hub(name: str, subset: str | None, split: str) -> Source:
    import datasets

    try:
        return _read_object(datasets.load_dataset(name, subset, split=split), name)
    except Exception as error:  # whatever the Hub client, a proxy or a loader raised, as the cause
        raise DataError(f"Loading {brief(name)} from the Hub failed: {reason(error)}") from error


def _pick_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(f"{name}: no split {split!r}; the splits are {', '.join(splits)}.")
    return splits[split]


def _read_registered(name: str, entry: Entry, split: str) -> Source:
    if entry.file is not None:
        source = _read_path(entry.file, entry.split or split)
    else:
        source = _load_hub(str(entry.hub), entry.subset, entry.split or split)
    if entry.count is not None and entry.count > len(source.rows):
        raise DataError(
            f"{entry.where}: num_samples is {entry.count}, but there are {len(source.rows)} rows."
        )
    return Source(f"{name} ({source.name})", source.rows[: entry.count], entry.layout)
