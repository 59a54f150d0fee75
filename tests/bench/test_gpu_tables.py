"""Rows of benches become tables, and figures of the README's cases its column."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "bench"
CARD = "a processor, 16 cores, 126 GiB, NVIDIA H200 140 GiB"
GIB = 2**30


@pytest.fixture
def gpu_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_tables")


def row(case: str, metric: str, value: float, impl: str = "fusedgrpo", **of: Any) -> dict[str, Any]:
    plain = {"bench": "memory", "unit": "byte", "machine": CARD}
    return plain | {"case": case, "metric": metric, "value": value, "impl": impl} | of


def memory_case(index: int) -> str:
    bench_memory = importlib.import_module("bench_memory")
    found: str = bench_memory.CASES[index].describe()
    return found


def column(text: str) -> dict[str, str]:
    """The last cell of each line of the README's table of memory, by its first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    [start] = [i for i, cells in enumerate(lines) if cells[-1] == "measured on a GPU"]
    return {cells[0]: cells[-1] for cells in lines[start + 2 : start + 7]}


def test_every_line_of_the_readme_is_filled_in_by_the_case_of_the_bench(gpu_tables) -> None:
    before = (ROOT / "README.md").read_text()
    rows = []
    for index in range(5):
        rows.append(row(memory_case(index), "measured/rollout", (index + 1.26) * GIB))
        rows.append(row(memory_case(index), "measured/update forward", (index + 1) * GIB))
    after, filled = gpu_tables.fill_in(before, rows)
    assert set(filled) == set(column(before)) and len(filled) == 5
    found = column(after)
    assert sorted(found.values()) == [f"{i + 1.26:.1f} (NVIDIA H200 140 GiB)" for i in range(5)]
    assert found["Qwen2.5-7B, 4,096"].startswith("1.3 (")  # the case 0
    assert [line for line in after.splitlines() if line not in before.splitlines()] == [
        line for line in after.splitlines() if "(NVIDIA H200" in line
    ]


@pytest.mark.parametrize(
    "other",
    [
        {"metric": "planned/update forward"},
        {"impl": "trl, 8 at once"},
        {"bench": "step"},
        {"case": "merged"},
        {"case": "offloaded"},
    ],
)
def test_what_was_measured_of_something_else_fills_nothing_in(gpu_tables, other) -> None:
    case = memory_case(0)
    cases = {
        "merged": f"{case}, rollout_weights: merged",
        "offloaded": f"{case}, activations offloaded",
    }
    case = cases.get(other.get("case", ""), case)
    text = (ROOT / "README.md").read_text()
    found = row(case, "measured/rollout", GIB) | {k: v for k, v in other.items() if k != "case"}
    assert gpu_tables.fill_in(text, [found]) == (text, [])
    assert gpu_tables.fill_in(text, [row(memory_case(0), "measured/rollout", GIB)])[1]


def test_a_table_has_medians_and_how_many_times_ours_a_peer_takes(gpu_tables) -> None:
    of = {"bench": "step", "unit": "s"}
    rows = [
        row("7B", "time", 2.0, **of),
        row("7B", "time/min", 1.9, **of),
        row("7B", "time/round", 2.0, **of),
        row("7B", "time", 7.0, "trl", **of),
        row("7B", "time/ratio", 3.5, "trl", **of),
        row("7B", "memory/peak", 3 * 2**20, **of | {"unit": "byte"}),
        row("14B", "time", 4.0, **of),
    ]
    first, second = gpu_tables.tables(rows)
    assert first.splitlines() == [
        f"**step: 7B** ({CARD})",
        "",
        "|  | fusedgrpo | trl |",
        "| --- | --- | --- |",
        "| time, s | 2 | 7 (3.50 x) |",
        "| memory/peak, MiB | 3 |  |",
    ]
    assert "14B" in second and "| time, s | 4 |" in second


def test_the_rows_of_the_session_on_an_h200_are_tables(gpu_tables) -> None:
    for file in sorted((BENCH / "results").glob("2026-11-26-gpu-*.jsonl")):
        rows = gpu_tables.read(file)
        found = list(gpu_tables.tables(rows))
        assert len(found) == len({(r["bench"], r["case"]) for r in rows})


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"bench": "step"}'])
def test_a_line_that_is_no_row_is_named(gpu_tables, tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("7B", "time", 1.0)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        gpu_tables.read(file)


def test_the_command_fills_a_file_in_or_says_why_not(gpu_tables, tmp_path, monkeypatch) -> None:
    rows, readme = tmp_path / "memory.jsonl", tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    monkeypatch.setattr(sys, "argv", ["gpu_tables.py", str(rows), "--readme", str(readme)])
    rows.write_text(json.dumps(row(memory_case(0), "simulated/rollout", GIB)) + "\n")
    with pytest.raises(SystemExit, match="none of the rows"):
        gpu_tables.main()
    rows.write_text(json.dumps(row(memory_case(0), "measured/rollout", 9 * GIB)) + "\n")
    gpu_tables.main()
    assert column(readme.read_text())["Qwen2.5-7B, 4,096"] == "9.0 (NVIDIA H200 140 GiB)"
