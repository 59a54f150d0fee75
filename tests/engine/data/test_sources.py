from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from fusedgrpo.engine.data.formats import AlpacaLayout, ConversationLayout
from fusedgrpo.engine.data.sources import read_source
from fusedgrpo.errors import DataError

ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(lines) + "\n\n")
    elif path.suffix == ".csv":
        path.write_text("\ufeffprompt,answer\r\na,1\r\n\r\nb,2\r\n")
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def values(source: Any, directory: Path, **kwargs: Any) -> list[dict[str, Any] | None]:
    return [row.values for row in read_source(source, directory, **kwargs).rows]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_files_are_found_by_path_and_by_name(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}")
    assert values(str(path), Path("nowhere")) == ROWS
    assert values("mine", tmp_path) == ROWS
    assert values(f"mine{suffix}", tmp_path) == ROWS


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl").rename(tmp_path / "a.json")
    assert values("a", tmp_path) == ROWS


def test_rows_know_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": \n[1]\n')
    rows = read_source("a", tmp_path).rows
    assert [row.where.rsplit("/", 1)[-1] for row in rows] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert "not valid JSON: Expecting value" in rows[1].reason
    assert "is list '[1]', expected an object" in rows[2].reason
    assert read_source(ROWS).rows[1].where == "row 1"


def test_line_separators_inside_json_strings_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b\x85c"}]
    assert values(str(write(tmp_path / "a.jsonl", rows)), tmp_path) == rows


def test_csv_values_are_text_and_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,answer\n"two\nlines",007\nx\n,y\n')
    rows = read_source("a", tmp_path).rows
    assert rows[0].values == {"prompt": "two\nlines", "answer": "007"}
    assert rows[1].values is None and "2 fields of the header" in rows[1].reason
    assert rows[1].where.endswith("a.csv:4")
    assert rows[2].values == {"prompt": "", "answer": "y"}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '[{"prompt": 1},\n{]', r"a\.json:2: not valid JSON"),
        ("a.json", '{\n"data": []}', "expected a list of objects"),
        ("a.csv", 'prompt\n"open', r"a\.csv:1: not valid CSV: unexpected end"),
        ("a.parquet", "no parquet", r"a\.parquet: cannot be read as Parquet"),
        ("a.txt", "x", r"a\.txt: expected a file ending in"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read_source(str(tmp_path / name))


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read as UTF-8"):
        read_source("a", tmp_path)


def test_saved_data_sets_and_their_splits(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"train": data, "test": data.select([1])})
    splits.save_to_disk(str(tmp_path / "two"))
    assert values("one", tmp_path) == ROWS
    assert values(str(tmp_path / "two"), tmp_path, split="test") == ROWS[1:]
    assert values(splits, tmp_path) == values(data, tmp_path) == ROWS
    with pytest.raises(DataError, match="no split 'dev'; the splits are train, test"):
        read_source("two", tmp_path, "dev")


def test_a_directory_that_is_no_data_set_shows_its_files(tmp_path: Path) -> None:
    write(tmp_path / "part.jsonl")
    with pytest.raises(DataError, match=r"name one of its files: part\.jsonl"):
        read_source(str(tmp_path))


def test_missing_paths_name_a_near_one(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=rf"does not exist\. Did you mean '{path}'"):
        read_source(str(tmp_path / "trian.jsonl"))


def test_names_that_are_nowhere_say_where_was_looked(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"my_math": {"file_name": "x.json"}}')
    with pytest.raises(DataError) as caught:
        read_source("my_maths", tmp_path)
    text = str(caught.value)
    assert f"{tmp_path / 'my_maths'}[.jsonl|.json|.csv|.parquet]" in text
    assert "Did you mean 'my_math'?" in text
    assert "Loading 'my_maths' from the Hub failed" in text


def test_streams_are_refused() -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(DataError, match="IterableDataset"):
        read_source(stream)


def registered(directory: Path, **entry: Any) -> Any:
    (directory / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    return read_source("mine", directory)


def test_registered_files_with_mapped_columns(tmp_path: Path) -> None:
    write(tmp_path / "qa.json")
    columns = {"prompt": "prompt", "response": "answer"}
    source = registered(tmp_path, file_name="qa.json", columns=columns, num_samples=1)
    assert [row.values for row in source.rows] == ROWS[:1]
    assert source.layout == AlpacaLayout("prompt", None, "answer", None, None)
    assert source.name == f"mine ({tmp_path / 'qa.json'})"


def test_registered_without_columns_is_told_from_the_columns(tmp_path: Path) -> None:
    write(tmp_path / "qa.json")
    assert registered(tmp_path, file_name="qa.json").layout is None


def test_registered_conversations(tmp_path: Path) -> None:
    write(tmp_path / "chat.json")
    source = registered(
        tmp_path,
        file_name="chat.json",
        formatting="sharegpt",
        columns={"messages": "turns", "system": "sys"},
        tags={"user_tag": "user", "assistant_tag": "bot"},
    )
    assert source.layout == ConversationLayout(
        column="turns",
        system="sys",
        roles={"system": "system", "user": "user", "bot": "assistant"},
    )


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "needs `file_name` or `hf_hub_url`"),
        ({"file_name": "absent.json"}, r"absent\.json' does not exist"),
        ({"file_name": "qa.json", "ranking": True}, "'ranking' is not supported"),
        ({"file_name": "qa.json", "columns": {"images": "i"}}, "'images' is not supported"),
        ({"file_name": "qa.json", "formatting": "xml"}, "formatting is 'xml'"),
        ({"file_name": "qa.json", "num_samples": 3}, "num_samples is 3, but there are 2 rows"),
    ],
)
def test_entries_that_cannot_be_used_are_named(
    tmp_path: Path, entry: dict[str, Any], said: str
) -> None:
    write(tmp_path / "qa.json")
    with pytest.raises(DataError, match=f"dataset_info.json: mine: .*{said}"):
        registered(tmp_path, **entry)


def test_a_broken_registry_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset_info\.json: cannot be read as JSON"):
        read_source("mine", tmp_path)


def test_csv_fields_may_be_of_any_length(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), "x" * 200_000
    path = tmp_path / "a.csv"
    path.write_text(f"\ufeffprompt,context\nhi,{long}\n\x00,b\n", encoding="utf-8")
    rows = read_source(str(path)).rows
    assert [row.values for row in rows] == [
        {"prompt": "hi", "context": long},
        {"prompt": "\0", "context": "b"},
    ]
    assert csv.field_size_limit() == limit
    path.write_text('prompt\n"open')
    with pytest.raises(DataError):
        read_source(str(path))
    assert csv.field_size_limit() == limit


def test_a_csv_column_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,x,x\n1,2,3\n")
    with pytest.raises(DataError, match="the header has two columns 'x'"):
        read_source(str(tmp_path / "a.csv"))


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="is no regular file"):
        read_source(str(tmp_path / "a.jsonl"))
