"""LLaMA-Factory's ``dataset_info.json``: data sets by name, where they are, how to read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedgrpo.engine.data.formats import LAYOUTS, Layout
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.errors import DataError, brief, did_you_mean, reason
from fusedgrpo.input_files import exists, read_text

FILE_NAME = "dataset_info.json"

_COLUMNS = ("prompt", "query", "response", "history", "messages", "system")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "system_tag")
_OTHER_TAGS = ("observation_tag", "function_tag")
_TEXTS = ("file_name", "hf_hub_url", "formatting", "subset", "split")


@dataclass(frozen=True, slots=True)
class Entry:
    """A registered data set: a file or a name on the Hub. count: use so many rows, None for all.
    layout: None to be told from the columns. where: the entry's place, for messages."""

    where: str
    file: Path | None
    hub: str | None
    subset: str | None
    split: str | None
    count: int | None
    layout: Layout | None


def read_registry(directory: Path) -> dict[str, Any]:
    """The entries of ``directory/dataset_info.json``, not checked yet; none if it is not there."""
    path = directory / FILE_NAME
    if not exists(path):
        return {}
    try:
        registry = json.loads(read_text(path, DataError))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as JSON: {reason(error)}.") from error
    if not isinstance(registry, dict):
        raise DataError(
            f"{path}: expected an object of data sets by name, found {brief(registry)}."
        )
    # The file of the same name inside a saved data set describes one data set, not several.
    if registry and not any(isinstance(entry, dict) for entry in registry.values()):
        return {}
    return registry


def read_entry(name: str, entry: Any, directory: Path, formats: Formats) -> Entry:
    """The content of ``entry``, every value checked. Raises DataError."""
    where = f"{directory / FILE_NAME}: {name}"
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {brief(entry)}.")
    known = (*_TEXTS, "num_samples", "columns", "tags")
    for key, value in entry.items():
        if key not in known and value:
            raise DataError(f"{where}: {key!r} is not supported here.{did_you_mean(key, known)}")
    texts = {key: _text(entry, key, where) for key in _TEXTS}
    file = None
    if texts["file_name"] is not None:
        file = directory / texts["file_name"]
        if not exists(file):
            raise DataError(f"{where}: file_name {str(file)!r} does not exist.")
    elif texts["hf_hub_url"] is None:
        raise DataError(f"{where}: needs `file_name` or `hf_hub_url`.")
    count = entry.get("num_samples")
    if count is not None and (type(count) is not int or count < 1):
        raise DataError(f"{where}: num_samples is {brief(count)}, expected an integer >= 1.")
    return Entry(
        where=where,
        file=file,
        hub=texts["hf_hub_url"],
        subset=texts["subset"],
        split=texts["split"],
        count=count,
        layout=_layout(entry, texts["formatting"], where, directory, formats),
    )


def _text(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not (isinstance(value, str) and value.strip()):
        raise DataError(f"{where}: {key} is {brief(value)}, expected text.")
    return value


def _texts(entry: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """``columns`` or ``tags``: names by names, or null for what is not there."""
    given = entry.get(key)
    if given is not None and not isinstance(given, dict):
        raise DataError(f"{where}: {key} is {brief(given)}, expected an object of names.")
    found = dict(given or {})
    return {name: _text(found, name, f"{where}: {key}") for name in found}


def _layout(
    entry: Mapping[str, Any],
    formatting: str | None,
    where: str,
    directory: Path,
    formats: Formats,
) -> Layout | None:
    columns, tags = _texts(entry, "columns", where), _texts(entry, "tags", where)
    for key, value in {**columns, **tags}.items():
        if key not in (*_COLUMNS, *_TAGS) and value and key not in _OTHER_TAGS:
            raise DataError(
                f"{where}: the column {key!r} is not supported here."
                f"{did_you_mean(key, (*_COLUMNS, *_TAGS))}"
            )
    layout = formats.of_entry(formatting, where, directory)
    if layout is None:  # names without a formatting are Alpaca's, as in LLaMA-Factory
        return LAYOUTS["alpaca"].mapped(columns, tags) if columns else None
    try:
        return layout.mapped(columns, tags)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
