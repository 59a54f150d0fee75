"""Read the rows of a data set from wherever it is.

JSON, JSONL, CSV and Parquet files, directories written by ``Dataset.save_to_disk``, names in
LLaMA-Factory's ``dataset_info.json``, Hub names, ``datasets.Dataset`` and lists of dicts.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedgrpo.engine.data.formats import Layout, kind_of
from fusedgrpo.engine.data.media import undecoded
from fusedgrpo.engine.data.registry import FILE_NAME, Entry, read_entry, read_registry
from fusedgrpo.errors import DataError, brief, did_you_mean, reason
from fusedgrpo.input_files import decode, exists, other_encoding, read_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

# Values in values of a row. What is nested deeper cannot be copied, compared or sent to a worker.
DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source. ``values`` is None where it could not be read, for ``reason``."""

    where: str
    values: dict[str, Any] | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """Rows, how to read them (None: to be told from the columns) and where they are from."""

    name: str
    rows: list[Row]
    layout: Layout | None = None


def read_source(source: Any, dataset_dir: str | Path = "data", split: str = "train") -> Source:
    """The rows of a data set given by name, path or object. ``split`` where there are several.

    Raises DataError if it is not there or cannot be read.
    """
    if isinstance(source, (str, Path)):
        return _read_named(str(source), Path(dataset_dir), split)
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
        return Source("list", [_row(f"row {i}", values) for i, values in enumerate(source)])
    if isinstance(source, Mapping):  # a DatasetDict
        return _read_object(_pick_split(source, split, "the data set"))
    if hasattr(source, "column_names") and hasattr(source, "__len__"):
        return _read_object(source)
    raise DataError(
        "A data set is a name, a path, a datasets.Dataset, a table of pandas, polars or pyarrow, "
        f"or a list of dicts, got {type(source).__name__}. Streamed data sets cannot be shuffled "
        "or resumed: load them."
    )


def _read_named(name: str, directory: Path, split: str) -> Source:
    """Registered in dataset_info.json, a path, a file in the data directory, or on the Hub."""
    registry = read_registry(directory)
    if name in registry:
        return _read_registered(name, read_entry(name, registry[name], directory), split)
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
    return Source(str(path), list(_read_file(path)))


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}.")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    data = read_bytes(path, DataError)
    if other := other_encoding(data):
        raise DataError(f"{path}: cannot be read as UTF-8 text{other}.")
    data = data.removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".csv":
        yield from _read_csv(path, data)
    elif path.suffix == ".json" and not _is_json_lines(data):
        yield from _read_json_list(path, data)
    else:
        yield from _read_json_lines(path, data)


def _is_json_lines(data: bytes) -> bool:
    """Whether a .json file holds one object per line, as many do, instead of a list."""
    first_line = data.lstrip().split(b"\n", 1)[0]
    return first_line.startswith(b"{") and first_line.rstrip().endswith(b"}")


def _read_json_list(path: Path, data: bytes) -> Iterator[Row]:
    text = decode(data, path, DataError)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, of brackets
        raise DataError(f"{path}: not valid JSON: {reason(error)}.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {kind_of(rows)}.")
    for i, values in enumerate(rows):
        yield _row(f"{path} row {i}", values)


def _read_json_lines(path: Path, data: bytes) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if lines and not any(map(_is_utf8, (line for _, line in lines))):
        raise DataError(f"{path}: cannot be read as UTF-8 text: not one line of it is.")
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            yield _row(where, json.loads(line.decode("utf-8")))
        except json.JSONDecodeError as error:
            yield Row(where, None, f"not valid JSON: {error.msg} (column {error.colno})")
        except UnicodeDecodeError as error:
            yield Row(where, None, f"not UTF-8 text: {error.reason} (byte {error.start})")
        except (ValueError, RecursionError) as error:
            yield Row(where, None, f"not valid JSON: {reason(error)}")


def _read_csv(path: Path, data: bytes) -> Iterator[Row]:
    """Every value is text, as written: "007" stays what it is. Fields may be of any length."""
    # Bytes that are not UTF-8 spoil the rows that have them, and not the file.
    text = data.decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []
    # The limit is the whole process's, so it is only lifted until all is read.
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        records += [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        line = records[-1][0] if records else 1  # the last that could be read
        raise DataError(f"{path}:{line}: not valid CSV: {error}.") from error
    finally:
        csv.field_size_limit(limit)
    header = records[0][1] if records else []
    if not _is_clean(header):
        raise DataError(f"{path}: its header is not UTF-8 text.")
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header has two columns {twice[0]!r}; rename one.")
    for line, fields in records[1:]:
        where = f"{path}:{line}"
        if len(fields) != len(header):
            yield Row(where, None, f"does not have the {len(header)} fields of the header")
        elif not _is_clean(fields):
            yield Row(where, None, "not UTF-8 text")
        else:
            yield Row(where, dict(zip(header, fields, strict=True)))


def _is_clean(fields: list[str]) -> bool:
    """Whether no byte had to be escaped in reading these."""
    return not any("\udc80" <= c <= "\udcff" for field in fields for c in field)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"{path}: is no regular file (a pipe or a device?); give a file.")
    try:
        table = pyarrow.parquet.read_table(path)
    except Exception as error:  # whatever the decoders make of damaged bytes
        raise DataError(f"{path}: cannot be read as Parquet: {reason(error)}") from error
    yield from _each(
        str(path), len(table), table.to_pylist, lambda i: table.slice(i, 1).to_pylist()[0]
    )


def _each(
    name: str, count: int, together: Callable[[], Iterable[Any]], alone: Callable[[int], Any]
) -> Iterator[Row]:
    """Rows that a library reads, ``together`` as far as it comes, from there one by one: values
    that Python has not, a damaged file, cost the rows that have them."""
    done = 0
    with contextlib.suppress(Exception):  # it comes again below, with the row it is about
        for values in together():
            yield _row(f"{name} row {done}", values)
            done += 1
    for i in range(done, count):
        try:
            yield _row(f"{name} row {i}", alone(i))
        except Exception as error:  # noqa: BLE001 - as many kinds as libraries
            yield Row(f"{name} row {i}", None, f"cannot be read: {reason(error)}")


def _row(where: str, values: Any) -> Row:
    if isinstance(values, Mapping):
        if _is_deep(values):
            return Row(where, None, f"is nested more than {DEEPEST} levels deep, or holds itself")
        for name in values:
            if not isinstance(name, str):
                kind = kind_of(name)
                return Row(where, None, f"has a column named {kind}, expected text as the name")
        return Row(where, dict(values))
    return Row(where, None, f"is {kind_of(values)}, expected an object with named columns")


def _is_deep(values: Any) -> bool:
    level = [values]
    for _ in range(DEEPEST):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, Mapping) else value)
            if isinstance(item, (Mapping, list, tuple))
        ]
        if not level:
            return False
    return True


def _read_object(dataset: Any, name: str = "dataset") -> Source:
    try:
        dataset, count = undecoded(dataset), len(dataset)
    except Exception as error:  # a class of somebody's own, or a damaged cache
        raise DataError(f"{name}: cannot be read: {reason(error)}.") from error
    return Source(name, list(_each(name, count, lambda: dataset, lambda i: dataset[i])))


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
