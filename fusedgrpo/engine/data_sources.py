"""Read the rows of a data set from wherever it is.

JSON, JSONL, CSV and Parquet files, directories written by ``Dataset.save_to_disk``, names in
LLaMA-Factory's ``dataset_info.json``, Hub names, ``datasets.Dataset`` and lists of dicts.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedgrpo.engine.data_formats import AlpacaLayout, ConversationLayout, Layout, kind_of
from fusedgrpo.engine.data_media import undecoded
from fusedgrpo.errors import DataError, did_you_mean

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


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
    for to_rows in ("to_pylist", "to_dicts"):  # tables of pyarrow and polars
        if hasattr(source, to_rows):
            source = getattr(source, to_rows)()
    if hasattr(source, "to_dict") and hasattr(source, "iloc"):  # a DataFrame of pandas
        source = source.to_dict("records")
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
    registry = _read_registry(directory)
    if name in registry:
        return _read_registered(name, registry[name], directory, split)
    given = Path(name).expanduser()
    named = [directory / f"{name}{suffix}" for suffix in ("", *SUFFIXES)]
    for path in (given, *named):
        if path.exists():
            return _read_path(path, split)
    if given.suffix in SUFFIXES or name.startswith((".", "/", "~")) or name.count("/") > 1:
        near = [str(p) for p in given.parent.glob("*") if p.suffix in SUFFIXES or p.is_dir()]
        raise DataError(f"Data set {name!r} does not exist.{did_you_mean(str(given), near)}")
    try:
        return _load_hub(name, None, split)
    except DataError as error:
        known = f", nor one of {', '.join(registry)} in its dataset_info.json" if registry else ""
        raise DataError(
            f"Data set {name!r} is neither a path nor {directory / name}[{'|'.join(SUFFIXES)}]"
            f"{known}.{did_you_mean(name, registry)} {error}"
        ) from error.__cause__


def _read_path(path: Path, split: str) -> Source:
    if path.is_dir():
        return _read_object(_load_directory(path, split), str(path))
    return Source(str(path), list(_read_file(path)))


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise DataError(f"{path}: is no regular file (a pipe or a device?); give a file.")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}.") from error
    if path.suffix == ".csv":
        yield from _read_csv(path, text)
    elif path.suffix == ".json" and not _is_json_lines(text):
        yield from _read_json_list(path, text)
    else:
        yield from _read_json_lines(path, text)


def _is_json_lines(text: str) -> bool:
    """Whether a .json file holds one object per line, as many do, instead of a list."""
    first_line = text.lstrip().split("\n", 1)[0]
    return first_line.startswith("{") and first_line.rstrip().endswith("}")


def _read_json_list(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}.") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of objects, found {kind_of(rows)}.")
    for i, values in enumerate(rows):
        yield _row(f"{path} row {i}", values)


def _read_json_lines(path: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _row(where, json.loads(line))
        except json.JSONDecodeError as error:
            yield Row(where, None, f"not valid JSON: {error.msg} (column {error.colno})")


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    """Every value is text, as written: "007" stays what it is. Fields may be of any length."""
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
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}: the header has two columns {twice[0]!r}; rename one.")
    for line, fields in records[1:]:
        where = f"{path}:{line}"
        if len(fields) != len(header):
            yield Row(where, None, f"does not have the {len(header)} fields of the header")
        else:
            yield Row(where, dict(zip(header, fields, strict=True)))


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error
    for i, values in enumerate(table.to_pylist()):
        yield Row(f"{path} row {i}", values)


def _row(where: str, values: Any) -> Row:
    if isinstance(values, Mapping):
        for name in values:
            if not isinstance(name, str):
                kind = kind_of(name)
                return Row(where, None, f"has a column named {kind}, expected text as the name")
        return Row(where, dict(values))
    return Row(where, None, f"is {kind_of(values)}, expected an object with named columns")


def _read_object(dataset: Any, name: str = "dataset") -> Source:
    rows = enumerate(undecoded(dataset))
    return Source(name, [Row(f"{name} row {i}", dict(row)) for i, row in rows])


def _load_directory(path: Path, split: str) -> Any:
    import datasets

    if not any((path / f).is_file() for f in ("state.json", "dataset_dict.json")):
        files = sorted(p.name for p in path.iterdir())[:10]
        raise DataError(
            f"{path}: not a directory written by Dataset.save_to_disk; name one of its files: "
            f"{', '.join(files) or 'it is empty'}."
        )
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be loaded: {error}") from error
    return _pick_split(dataset, split, str(path)) if isinstance(dataset, Mapping) else dataset


def _load_hub(name: str, subset: str | None, split: str) -> Source:
    import datasets

    try:
        return _read_object(datasets.load_dataset(name, subset, split=split), name)
    except Exception as error:  # whatever the Hub client, a proxy or a loader raised, as the cause
        raise DataError(
            f"Loading {name!r} from the Hub failed: {type(error).__name__}: {error}"
        ) from error


def _pick_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise DataError(f"{name}: no split {split!r}; the splits are {', '.join(splits)}.")
    return splits[split]


_COLUMNS = ("prompt", "query", "response", "history", "messages", "system")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
_OTHER_TAGS = ("observation_tag", "function_tag")
_ENTRY = ("file_name", "hf_hub_url", "formatting", "subset", "split", "num_samples")


def _read_registry(directory: Path) -> dict[str, Any]:
    path = directory / "dataset_info.json"
    if not path.is_file():
        return {}
    try:
        registry = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}.") from error
    # The file of the same name inside a saved data set describes one data set, not several.
    if not isinstance(registry, dict) or not all(isinstance(e, dict) for e in registry.values()):
        return {}
    return registry


def _read_registered(name: str, entry: dict[str, Any], directory: Path, split: str) -> Source:
    where = f"{directory / 'dataset_info.json'}: {name}"
    for key, value in entry.items():
        if key not in (*_ENTRY, "columns", "tags") and value:
            raise DataError(f"{where}: {key!r} is not supported here.{did_you_mean(key, _ENTRY)}")
    layout = _registered_layout(entry, where)
    if "file_name" in entry:
        path = directory / entry["file_name"]
        if not path.exists():
            raise DataError(f"{where}: file_name {str(path)!r} does not exist.")
        source = _read_path(path, entry.get("split") or split)
    elif "hf_hub_url" in entry:
        source = _load_hub(entry["hf_hub_url"], entry.get("subset"), entry.get("split") or split)
    else:
        raise DataError(f"{where}: needs `file_name` or `hf_hub_url`.")
    count = entry.get("num_samples")
    if count is not None and count > len(source.rows):
        raise DataError(f"{where}: num_samples is {count}, but there are {len(source.rows)} rows.")
    return Source(f"{name} ({source.name})", source.rows[:count], layout)


def _registered_layout(entry: dict[str, Any], where: str) -> Layout | None:
    formatting = entry.get("formatting", "alpaca")
    columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    for key, value in {**columns, **tags}.items():
        if key not in (*_COLUMNS, *_TAGS) and value and key not in _OTHER_TAGS:
            raise DataError(
                f"{where}: the column {key!r} is not supported here."
                f"{did_you_mean(key, (*_COLUMNS, *_TAGS))}"
            )
    if formatting == "alpaca":
        if not columns and "formatting" not in entry:
            return None
        if not columns:
            return AlpacaLayout()
        # As in LLaMA-Factory: where `columns` is given, what it does not name is not used.
        names = {key: columns.get(key) for key in ("query", "response", "system", "history")}
        return AlpacaLayout(columns.get("prompt", "instruction"), **names)
    if formatting not in ("sharegpt", "openai"):
        raise DataError(f"{where}: formatting is {formatting!r}, expected alpaca or sharegpt.")
    openai = formatting == "openai"
    default = {
        "role_tag": "role" if openai else "from",
        "content_tag": "content" if openai else "value",
        "user_tag": "user" if openai else "human",
        "assistant_tag": "assistant" if openai else "gpt",
        "system_tag": "system",
    }
    tags = {**default, **tags}
    return ConversationLayout(
        column=columns.get("messages", "messages" if openai else "conversations"),
        system=columns.get("system"),
        role_tag=tags["role_tag"],
        content_tag=tags["content_tag"],
        roles={tags[f"{role}_tag"]: role for role in ("system", "user", "assistant")},
    )
