"""Whatever is given as data is read, or refused or skipped in a line."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.dataset import PromptDataset, load_prompts
from fusedgrpo.errors import DataError, FusedGRPOError

GOOD = '{"prompt": "w4"}\n'


def load(source: Any, directory: Path, on_bad_row: str = "skip") -> PromptDataset | None:
    """The prompts, or None where the source is refused. Anything else is not caught."""
    options = {"on_bad_row": on_bad_row, "max_completion_length": 4, "dataset_dir": str(directory)}
    try:
        prompts = load_prompts(
            source, GRPOConfig(**options), tiny.tokenizer(), vocab_size=40, context_length=128
        )
    except FusedGRPOError as error:
        assert len(str(error)) < 6000
        return None
    assert len(prompts.fingerprint) == 64
    return prompts


LINES = {
    "not closed": '{"prompt": "w4"',
    "half a pair": '{"prompt": "w4 \\ud800"}',
    "half a pair in a message": '{"prompt": [{"role": "user", "content": "\\ud800"}]}',
    "half a pair in a column": '{"prompt": [1], "x": "\\ud800"}',
    "too many digits": '{"prompt": "w4", "x": ' + "9" * 5000 + "}",
    "digits in the prompt": '{"prompt": ' + "9" * 4000 + "}",
    "very deep": '{"prompt": "w4", "x": ' + "[" * 5000 + "]" * 5000 + "}",
    "deep": '{"prompt": "w4", "x": ' + "[" * 300 + "]" * 300 + "}",
    "no object": "[1, 2]",
    "null": "null",
    "a number": "1",
    "an infinite number": '{"prompt": Infinity}',
    "a number as the prompt": '{"prompt": 1e999}',
    "messages of numbers": '{"prompt": [1, 2]}',
    "messages without content": '{"prompt": [{"role": "user"}]}',
    "a role that is a list": '{"prompt": [{"role": [], "content": "w4"}]}',
    "an object as the prompt": '{"prompt": {"role": "user", "content": "w4"}}',
    "NUL": "\0",
    "controls": "\x1b[31m",
    "another encoding": b'{"prompt": "\xe9"}',
    "binary": bytes(range(256)).replace(b"\n", b""),
}


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line_costs_its_row(tmp_path: Path, kind: str) -> None:
    line = LINES[kind]
    data = line if isinstance(line, bytes) else line.encode()
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_bytes(GOOD.encode() + data + b"\n")
        prompts = load(str(tmp_path / name), tmp_path)
        assert prompts is not None and len(prompts) == len(prompts.skipped) == 1
        assert load(str(tmp_path / name), tmp_path, "error") is None


ROWS: dict[str, dict[str, Any]] = {
    "history is a number": {"instruction": "w4", "history": 5},
    "history is text": {"instruction": "w4", "history": "w5"},
    "history of text": {"instruction": "w4", "history": ["w5"]},
    "history of numbers": {"instruction": "w4", "history": [[1, 2]]},
    "input is a list": {"instruction": "w4", "input": []},
    "system is an object": {"instruction": "w4", "system": {"a": 1}},
    "a role that cannot be hashed": {"prompt": [{"role": {}, "content": "w4"}]},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_bad_row_is_no_traceback(tmp_path: Path, kind: str) -> None:
    good = {key: "w4" for key in ROWS[kind] if key in ("prompt", "instruction")}
    prompts = load([good, ROWS[kind]], tmp_path)
    assert prompts is not None and len(prompts.skipped) == 1
    assert load([good, ROWS[kind]], tmp_path, "error") is None


FILES: dict[str, bytes] = {
    "empty": b"",
    "blank": b"\n\n  \n",
    "a mark": b"\xef\xbb\xbf",
    "UTF-16": GOOD.encode("utf-16"),
    "UTF-32": GOOD.encode("utf-32"),
    "zeros": bytes(1000),
    "binary": bytes(range(256)) * 4,
    "latin": b"prompt\n\xe9\n",
    "a list of numbers": b"[1, 2]",
    "an object": b'{"prompt": {"a": 1}}',
    "an unfinished list": b'[{"prompt": "w4"},',
    "a deep list": b"[" * 5000 + b"]" * 5000,
    "digits": b"[" + b"9" * 5000 + b"]",
    "an open quote": b'prompt\n"w4',
    "a header": b"prompt,x",
    "two columns of a name": b"prompt,prompt\nw4,w5\n",
    "a header in another encoding": b"prompt,\xe9\nw4,1\n",
    "more fields": b"prompt\nw4,1\nw5,1\n",
    "magic bytes": b"PAR1" + bytes(20) + b"PAR1",
}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("kind", FILES)
def test_a_bad_file_is_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(FILES[kind])
    assert load(str(tmp_path / f"a.{suffix}"), tmp_path) is None


def test_bytes_of_another_encoding_cost_a_row_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,x\nw4,1\nw5,\xe9\nw6,a\0b\n")
    prompts = load(str(tmp_path / "a.csv"), tmp_path)
    assert prompts is not None and [bad["row"] for bad in prompts.skipped] == [1]


@pytest.mark.parametrize(
    "name",
    [
        *("", ",", ",,", "x" * 5000, "a\0b", "~nobody_of_this_name/x", "/", "."),
        *("/dev/zero", "/dev/null", "/proc/self/mem", "a/b/c/d.jsonl", "\udcff.jsonl"),
        *("é" * 300 + ".csv", "pipe.jsonl", "loop.csv"),
    ],
)
def test_names_that_are_no_files_are_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    Path("loop.csv").symlink_to("loop.csv")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        Path(f"folder.{suffix}").mkdir()
        assert load(f"folder.{suffix}", tmp_path) is None
    assert load(name, tmp_path) is None


def test_values_that_python_has_not_cost_their_rows(tmp_path: Path) -> None:
    far = pyarrow.array([0, 2**62], pyarrow.timestamp("ms"))
    table = pyarrow.table({"prompt": ["w4", "w5"], "when": far})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for source in (str(tmp_path / "a.parquet"), datasets.Dataset(table)):
        prompts = load(source, tmp_path)
        assert prompts is not None and len(prompts) == len(prompts.skipped) == 1


def test_columns_of_any_type_are_read(tmp_path: Path) -> None:
    columns = {
        "bytes": [b"\xff", None],
        "decimal": [decimal.Decimal("1.5"), None],
        "date": [datetime.date(2026, 1, 1), None],
        "nested": [{"a": [{"b": 1}]}, None],
        "map": pyarrow.array([[("k", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int8())),
        "big": pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
        "nan": [float("nan"), float("inf")],
        "category": pyarrow.array(["x", None]).dictionary_encode(),
        "nothing": pyarrow.nulls(2),
    }
    table = pyarrow.table({"prompt": ["w4", "w5"], **columns})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    prompts = load(str(tmp_path / "a.parquet"), tmp_path, "error")
    assert prompts is not None and len(prompts) == 2
    twice = pyarrow.Table.from_arrays([pyarrow.array(["w4"])] * 2, ["prompt", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    assert load(str(tmp_path / "b.parquet"), tmp_path) is None


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_file_that_ends_anywhere_is_no_traceback(tmp_path: Path, suffix: str) -> None:
    rows = datasets.Dataset.from_list([{"prompt": f"w{4 + i}", "x": [i]} for i in range(9)])
    path = tmp_path / f"a.{suffix}"
    {
        "json": lambda: path.write_text(json.dumps(rows.to_list())),
        "jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        "csv": lambda: path.write_text("prompt,x\n" + 'w4,"a\nb"\n' * 9),
        "parquet": lambda: rows.to_parquet(path),
    }[suffix]()
    whole = path.read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:end])
        load(str(path), tmp_path)
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:at] + b"\xff\x00\x80" + whole[at + 3 :])
        load(str(path), tmp_path)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "no state": lambda d: (d / "state.json").unlink(),
    "an empty state": lambda d: (d / "state.json").write_text("{}"),
    "a state of a list": lambda d: (d / "state.json").write_text("[]"),
    "no JSON": lambda d: (d / "state.json").write_text("{"),
    "files of numbers": lambda d: (d / "state.json").write_text('{"_data_files": [1]}'),
    "no description": lambda d: (d / "dataset_info.json").write_text("[]"),
    "a strange description": lambda d: (d / "dataset_info.json").write_text('{"features": 5}'),
    "no data": lambda d: [path.unlink() for path in d.glob("*.arrow")],
    "empty data": lambda d: [path.write_bytes(b"") for path in d.glob("*.arrow")],
    "half the data": lambda d: [
        path.write_bytes(path.read_bytes()[:150]) for path in d.glob("*.arrow")
    ],
    "splits of a number": lambda d: (
        (d / "state.json").rename(d / "dataset_dict.json").write_text('{"splits": 5}')
    ),
    "splits that are not there": lambda d: (
        (d / "state.json").rename(d / "dataset_dict.json").write_text('{"splits": ["a"]}')
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_directory_is_refused(tmp_path: Path, kind: str) -> None:
    datasets.Dataset.from_list([{"prompt": "w4"}]).save_to_disk(tmp_path / "d")
    DAMAGES[kind](tmp_path / "d")
    assert load(str(tmp_path / "d"), tmp_path / "elsewhere") is None
    shutil.rmtree(tmp_path / "d")


ENTRIES: dict[str, Any] = {
    "no object": 5,
    "a list": [],
    "nothing": {},
    "file_name is a number": {"file_name": 5},
    "file_name is null": {"file_name": None},
    "file_name is empty": {"file_name": ""},
    "file_name has a NUL": {"file_name": "a\0b"},
    "file_name is long": {"file_name": "x" * 5000},
    "a list of files": {"file_name": ["a.jsonl"]},
    "a Hub name that is a number": {"hf_hub_url": 5},
    "subset": {"file_name": "a.jsonl", "subset": 1},
    "split": {"file_name": "a.jsonl", "split": ["train"]},
    "formatting": {"file_name": "a.jsonl", "formatting": 1},
    "formatting is a list": {"file_name": "a.jsonl", "formatting": []},
    "columns is text": {"file_name": "a.jsonl", "columns": "prompt"},
    "columns is a list": {"file_name": "a.jsonl", "columns": ["prompt"]},
    "a column is a number": {"file_name": "a.jsonl", "columns": {"prompt": 5}},
    "a column is a list": {"file_name": "a.jsonl", "columns": {"prompt": ["prompt"]}},
    "tags is a list": {"file_name": "a.jsonl", "formatting": "sharegpt", "tags": [1]},
    "a tag is a list": {"file_name": "a.jsonl", "formatting": "openai", "tags": {"user_tag": [1]}},
    "num_samples is text": {"file_name": "a.jsonl", "num_samples": "5"},
    "num_samples is a share": {"file_name": "a.jsonl", "num_samples": 0.5},
    "num_samples is negative": {"file_name": "a.jsonl", "num_samples": -1},
    "num_samples is true": {"file_name": "a.jsonl", "num_samples": True},
    "num_samples is huge": {"file_name": "a.jsonl", "num_samples": 10**30},
    "another key": {"file_name": "a.jsonl", "script_url": "x"},
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_a_bad_entry_is_refused_by_its_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"e": ENTRIES[kind], "f": {}}))
    with pytest.raises(DataError, match=r"dataset_info\.json: e: "):
        load_prompts(
            "e",
            GRPOConfig(dataset_dir=str(tmp_path)),
            tiny.tokenizer(),
            vocab_size=40,
            context_length=None,
        )


@pytest.mark.parametrize("text", ["", "{", "[1]", "5", "[" * 5000, '{"e": ' + "9" * 5000 + "}"])
def test_a_bad_registry_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset_info.json").write_text(text)
    assert load("e", tmp_path) is None
    (tmp_path / "dataset_info.json").write_bytes(b"\xff\xfe")
    assert load("e", tmp_path) is None
    (tmp_path / "dataset_info.json").unlink()
    (tmp_path / "dataset_info.json").mkdir()
    assert load("e", tmp_path) is None


class Raises:
    column_names = ("prompt",)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        raise KeyError(index)


@pytest.mark.parametrize(
    "source", [Raises(), 5, b"x", object(), {}, {"test": []}, [], [None], iter([])]
)
def test_a_bad_object_is_refused(tmp_path: Path, source: Any) -> None:
    assert load(source, tmp_path) is None
