"""Whatever is folded, cut or stopped half-way: the records that were written come back."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgrpo.engine.reporting import completions_folding, completions_parquet
from fusedgrpo.engine.reporting.completions_folding import FoldingLog
from fusedgrpo.engine.reporting.completions_reader import Completions, scores_from

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), max_size=2)
NAMES = st.sampled_from(["accuracy", "a.b", "a", "", "with space", "rewards/a", "prüfung\0"])
RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "set": st.sampled_from(["", "math"]) | JSON,
        "group": st.integers(0, 9) | JSON,
        "row": st.integers() | JSON,
        "prompt": TEXTS | MESSAGES | JSON,
        "completion": TEXTS,
        "finish_reason": st.sampled_from(["stop", "length"]),
        "length": st.integers(0, 9),
        "rewards": st.dictionaries(NAMES, st.none() | st.floats(-1, 1) | JSON, max_size=3) | JSON,
        "reward": st.floats(-1, 1) | JSON,
        "advantage": st.floats(-1, 1),
        "extra": JSON,
        "rest": JSON,
        "messages": JSON,
        "mode": JSON,
    },
)


@pytest.fixture(autouse=True)
def _folds_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions_folding, "FOLDED", 4)


def record(step: int, i: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "group": i, "row": step + i, "prompt": f"p{i}", "completion": f"of {step}", "length": 3,
        "finish_reason": "length" if i else "stop", "rewards": {"a": float(step), "b": None},
        "reward": step / 2, "advantage": -0.5, "extra": {}, **more,
    }  # fmt: skip


def log_of(path: Path, steps: Iterator[int] | range) -> FoldingLog:
    log = FoldingLog(path)
    for step in steps:
        log.write(step, [record(step), record(step, 1)])
        assert log.fold_if_due() is None
    return log


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def read(path: Path) -> dict[int, list[dict[str, Any]]]:
    found = Completions(path)
    return {step: found.read(step) for step in found.steps}


def same_scores(one: Any, other: Any) -> None:
    assert list(one.parts) == list(other.parts)
    for name in ("step", "group", "row", "length", "cut", "reward", "advantage"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name, values in one.parts.items():
        np.testing.assert_array_equal(values, other.parts[name])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(RECORDS, max_size=3), min_size=4, max_size=9), st.integers(-1, 9))
def test_records_come_back_as_they_were_written(
    written: list[list[dict[str, Any]]], kept: int
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "completions"
        log = FoldingLog(path)
        for step, records in enumerate(written):
            log.write(step, records)
        expected = {
            step: [{"step": step, **each} for each in records]
            for step, records in enumerate(written)
        }
        as_typed = read(path)
        before = Completions(path).scores
        assert repr_of(as_typed) == repr_of(expected)
        assert log.fold_if_due() is None
        assert len(list(path.glob("*.parquet"))) == len(written) // 4
        assert len(list(path.glob("*.jsonl"))) == len(written) % 4
        assert repr_of(read(path)) == repr_of(expected)
        same_scores(Completions(path).scores, before)

        said = log.drop_after(kept)
        later = {step: records for step, records in expected.items() if step > kept}
        assert (said is not None) == bool(later)
        rest = {step: records for step, records in expected.items() if step <= kept}
        assert repr_of(read(path)) == repr_of(rest)
        same_scores(
            Completions(path).scores, scores_from(r for each in rest.values() for r in each)
        )
        if later:
            assert repr_of(read(path / "dropped-001")) == repr_of(later)


def repr_of(records: Any) -> str:
    """1, 1.0 and True apart."""
    return json.dumps(records, sort_keys=True)


def test_a_long_run_is_few_files_with_columns_for_people(tmp_path: Path) -> None:
    log = log_of(tmp_path, range(1, 11))
    assert names(tmp_path) == [
        "step-000009.jsonl", "step-000010.jsonl",
        "steps-000001-000004.parquet", "steps-000005-000008.parquet",
    ]  # fmt: skip
    table = pq.read_table(tmp_path / "steps-000005-000008.parquet").to_pandas()
    assert list(table.columns) == [
        "step", "group", "row", "prompt", "completion", "finish_reason", "length", "reward",
        "advantage", "rewards/a", "rewards/b", "messages", "extra", "rest",
    ]  # fmt: skip
    assert table["rewards/a"].tolist() == [5, 5, 6, 6, 7, 7, 8, 8]
    footer = pq.read_metadata(tmp_path / "steps-000005-000008.parquet")
    ranges = [footer.row_group(i).column(0).statistics for i in range(4)]
    assert [(each.min, each.max) for each in ranges] == [(step, step) for step in (5, 6, 7, 8)]
    assert Completions(tmp_path).steps == list(range(1, 11))
    steps = Completions(tmp_path)
    (first, _), (last, _) = (steps.read(steps.steps[i]) for i in (0, -1))
    assert (first["step"], last["step"]) == (1, 10)

    assert "steps 7-10 was moved to" in str(log.drop_after(6))
    assert names(tmp_path) == [
        "dropped-001", "steps-000001-000004.parquet", "steps-000005-000006.parquet",
    ]  # fmt: skip
    assert Completions(tmp_path).scores.reward.tolist() == [
        s / 2 for s in range(1, 7) for _ in "ab"
    ]
    log_of(tmp_path, range(7, 11))
    assert Completions(tmp_path).steps == list(range(1, 11))
    assert "steps-000007-000010.parquet" in names(tmp_path)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("drops", [False, True])
def test_a_stop_at_any_point_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drops: bool
) -> None:
    """Stopped before the first change of a name, before the second, ...: all points where a folder
    is in between."""
    left = 0
    for number in range(1, 100):
        path = tmp_path / str(number)
        log = log_of(path, range(1, 8) if drops else range(1, 4))
        if not drops:
            log.write(4, [record(4), record(4, 1)])
        expected = read(path)
        left = number

        def counted(change: Any) -> Any:
            def changed(*arguments: Any, **how: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    raise Stopped
                return change(*arguments, **how)

            return changed

        with monkeypatch.context() as patched:
            for owner, name in (
                (os, "replace"),
                (os, "rename"),
                (Path, "rename"),
                (Path, "unlink"),
            ):
                patched.setattr(owner, name, counted(getattr(owner, name)))
            try:
                log.drop_after(2) if drops else log.fold_if_due()
                break  # it was not stopped: these were all points
            except Stopped:
                pass
        found = read(path)
        dropped = [read(each) for each in path.glob("dropped-*")]
        assert {step for each in (found, *dropped) for step in each} == set(expected)
        for each in (found, *dropped):
            assert each == {step: expected[step] for step in each}
        assert len(Completions(path).scores) == 2 * len(found)
        # Again, as a run does that goes on.
        again = FoldingLog(path)
        if drops:
            again.drop_after(2)
            assert read(path) == {step: expected[step] for step in (1, 2)}
        log_of(path, range(3 if drops else 5, 9))
        assert Completions(path).steps == list(range(1, 9))
        assert len(list(path.glob("*.jsonl"))) == (2 if drops else 0)
        assert not list(path.glob(".*"))
    assert number > (6 if drops else 4)


def test_a_full_disk_leaves_everything_and_is_tried_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = FoldingLog(tmp_path)
    tried = []

    def full(*_: Any) -> None:
        tried.append(len(log.loose))
        (tmp_path / ".steps-000001-000004.parquet.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(completions_parquet, "write", full)
        said = []
        for step in range(1, 8):
            log.write(step, [record(step)])
            said.append(log.fold_if_due())
    assert tried == [4] and "No space left on device" in str(said[3])
    assert said[4:] == [None] * 3
    log.write(8, [record(8)])
    assert log.fold_if_due() is None
    assert names(tmp_path) == ["steps-000001-000004.parquet", "steps-000005-000008.parquet"]
    assert read(tmp_path)[3] == [{"step": 3, **record(3)}]


def test_what_a_disk_refuses_half_way_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(tmp_path, range(1, 4))
    log.write(4, [record(4)])

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    assert "could not be made into one" in str(log.fold_if_due())
    assert names(tmp_path) == [f"step-00000{step}.jsonl" for step in (1, 2, 3, 4)]


def test_torn_and_foreign_files_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log_of(tmp_path, range(1, 9))
    whole = (tmp_path / "steps-000005-000008.parquet").read_bytes()
    (tmp_path / "steps-000020-000030.parquet").write_bytes(whole[:-9])
    (tmp_path / "steps-mine.parquet").write_bytes(b"")
    pq.write_table(pq.read_table(tmp_path / "steps-000001-000004.parquet").drop(["rest"])
                   .replace_schema_metadata(), tmp_path / "steps-other.parquet")  # fmt: skip
    (tmp_path / "step-notes.jsonl").write_text("mine")
    (tmp_path / "step-000009.jsonl").write_text(json.dumps({"reward": 1.0}) + '\n{"re')
    # A file that is whole by its footer and spoiled inside.
    spoiled = bytearray(whole)
    spoiled[4:200] = bytes(196)
    (tmp_path / "steps-000005-000008.parquet").write_bytes(spoiled)
    found = Completions(tmp_path)
    assert found.steps == list(range(1, 10))
    assert found.read(1)[0]["reward"] == 0.5
    assert found.read(5) == []
    assert found.read(9) == [{"reward": 1.0}]
    assert set(found.scores.step.tolist()) == {1, 2, 3, 4, 9}
    for name in ("steps-000020-000030", "steps-mine", "steps-other", "step-000009"):
        assert name in caplog.text
    # What is no record is not made away with by folding.
    log_of(tmp_path, range(10, 14))
    assert "step-000009.jsonl" in names(tmp_path) and "step-notes.jsonl" in names(tmp_path)
    assert "steps-000010-000013.parquet" in names(tmp_path)
    # Nor does it keep a run from going on.
    FoldingLog(tmp_path).drop_after(6)
    assert Completions(tmp_path).steps == [1, 2, 3, 4]
    assert "steps-000005-000008.parquet" in names(tmp_path / "dropped-001")


def test_a_reader_finds_what_was_folded_since_it_looked(tmp_path: Path) -> None:
    log = log_of(tmp_path, range(1, 4))
    found = Completions(tmp_path)
    assert found.steps == [1, 2, 3]
    log.write(4, [record(4)])
    log.fold_if_due()
    assert not list(tmp_path.glob("*.jsonl"))
    assert found.read(2) == [{"step": 2, **record(2)}, {"step": 2, **record(2, 1)}]
    assert len(found.scores) == 7
