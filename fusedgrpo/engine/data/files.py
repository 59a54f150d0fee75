"""The rows of JSON, JSONL, CSV and Parquet files."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from fusedgrpo.engine.data.rows import Row, each_row, kind_of, read_row
from fusedgrpo.errors import DataError, reason
from fusedgrpo.input_files import decode, other_encoding, read_bytes

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: Path) -> Iterator[Row]:
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
        yield read_row(f"{path} row {i}", values)


def _read_json_lines(path: Path, data: bytes) -> Iterator[Row]:
    # Not splitlines(): JSON strings may hold U+2028 and its like.
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if lines and not any(map(_is_utf8, (line for _, line in lines))):
        raise DataError(f"{path}: cannot be read as UTF-8 text: not one line of it is.")
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            yield read_row(where, json.loads(line.decode("utf-8")))
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
    yield from each_row(
        str(path), len(table), table.to_pylist, lambda i: table.slice(i, 1).to_pylist()[0]
    )
