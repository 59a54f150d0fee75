"""Rows of a session on a GPU as Markdown: tables for docs/measured.md, and the README's column.

    python bench/gpu_tables.py out/*.jsonl                     # tables, to standard output
    python bench/gpu_tables.py out/*.jsonl --readme README.md  # and "measured on a GPU" filled in

The rows are those that the benches write with ``--json``. A table has a line for each metric and a
column for each contender: the median and, of a peer, how many times ours that is. The README's
column is the largest of the peaks that ``bench_memory.py --measure`` found for a case, in GiB, and
the card; lines without rows stay as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import OURS, SHOWN

from fusedgrpo.engine.memory.plan import GIB

COLUMN = "measured on a GPU"
PARTS = ("round", "min", "max", "ratio")  # of a metric that has a line of its own

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="fill in its column")
    args = parser.parse_args()
    rows = [row for file in args.files for row in read(file)]
    print("\n\n".join(tables(rows)))
    if args.readme is not None:
        text, filled = fill_in(args.readme.read_text(), rows)
        if not filled:
            sys.exit(f"{args.readme}: none of the rows is a measured peak of one of its cases")
        args.readme.write_text(text)
        print(f"\n{args.readme}: {', '.join(filled)}", file=sys.stderr)


def read(file: Path) -> list[Row]:
    """The rows of ``file``. ValueError with the line for what is none."""
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            missing = {"bench", "case", "impl", "metric", "value", "unit", "machine"} - row.keys()
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{file}, line {number} is no row of a bench: {error}") from error
        if missing:
            raise ValueError(f"{file}, line {number} lacks {', '.join(sorted(missing))}")
        rows.append(row)
    return rows


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """One table of each bench, case and machine, in the order of the rows."""
    for bench, case, machine in dict.fromkeys((r["bench"], r["case"], r["machine"]) for r in rows):
        these = [r for r in rows if (r["bench"], r["case"], r["machine"]) == (bench, case, machine)]
        impls = list(dict.fromkeys(r["impl"] for r in these))
        found = {(r["metric"], r["impl"]): r for r in these}
        metrics = [m for m in dict.fromkeys(r["metric"] for r in these) if not _is_part(m)]
        lines = [f"**{bench}: {case}** ({machine})", ""]
        lines += [_line(["", *impls]), _line(["---"] * (len(impls) + 1))]
        for metric in metrics:
            cells = [_cell(found, metric, impl) for impl in impls]
            lines.append(_line([f"{metric}, {_unit(found, metric, impls)}".rstrip(", "), *cells]))
        yield "\n".join(lines)


def fill_in(text: str, rows: Iterable[Row]) -> tuple[str, list[str]]:
    """``text`` with the column ``COLUMN`` of its table filled in, and the cases that were."""
    peaks = measured_peaks(rows)
    lines, filled, column = text.splitlines(keepends=True), [], None
    for at, line in enumerate(lines):
        if not line.startswith("|"):
            column = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if COLUMN in cells:
            column = cells.index(COLUMN)
        elif column is not None and (found := peaks.get(_case(cells[0]))) is not None:
            size, card = found
            cells[column] = f"{size / GIB:.1f} ({card})"
            lines[at] = _line(cells) + "\n"
            filled.append(cells[0])
    return "".join(lines), filled


def measured_peaks(rows: Iterable[Row]) -> dict[tuple[str, int], tuple[int, str]]:
    """The largest peak in bytes and the card, by model and tokens of a sequence. Cases that are
    merged, offloaded or cut are others than the README's."""
    peaks: dict[tuple[str, int], tuple[int, str]] = {}
    for row in rows:
        plain = re.fullmatch(
            r"([^,]+), 8 x (\d+) tokens, NF4, LoRA r=64, \d+ tokens per micro-batch", row["case"]
        )
        if row["bench"] != "memory" or plain is None or row["impl"] != OURS:
            continue
        if row["metric"].startswith("measured/"):
            key = plain[1].lower(), int(plain[2])
            before = peaks.get(key, (0, ""))
            peaks[key] = max(before, (row["value"], row["machine"].rsplit(", ", 1)[-1]))
    return peaks


def _case(cell: str) -> tuple[str, int] | None:
    """``Qwen2.5-7B, 4,096`` as model and tokens."""
    found = re.match(r"([^,]+), ([\d,]*\d)", cell)
    return None if found is None else (found[1].lower(), int(found[2].replace(",", "")))


def _is_part(metric: str) -> bool:
    return metric.rsplit("/", 1)[-1] in PARTS


def _cell(found: Mapping[tuple[str, str], Row], metric: str, impl: str) -> str:
    row = found.get((metric, impl))
    if row is None:
        return ""
    scale, _ = SHOWN.get(row["unit"], (1, row["unit"]))
    ratio = found.get((f"{metric}/ratio", impl))
    times = "" if ratio is None else f" ({ratio['value']:.2f} x)"
    return f"{row['value'] / scale:,.4g}{times}"


def _unit(found: Mapping[tuple[str, str], Row], metric: str, impls: Iterable[str]) -> str:
    unit: str = next(found[metric, impl]["unit"] for impl in impls if (metric, impl) in found)
    return SHOWN.get(unit, (1, unit))[1]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
