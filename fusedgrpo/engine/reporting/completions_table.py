"""Sampled completions as a table for a terminal, or as lines of a log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from fusedgrpo.engine.reporting.completions_log import completion_text, prompt_text
from fusedgrpo.engine.reporting.formatting import number, one_line, printable, shorten


def completions_table(step: int, records: Sequence[Mapping[str, Any]], more: int = 0) -> Table:
    """A table of sampled completions: the prompt once per group, then one row per completion.
    more: how many of the step are left out."""
    table = Table(title=f"Completions of step {step}", title_justify="left", show_lines=True)
    if more:
        table.caption, table.caption_justify = _left_out(more), "left"
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=4)
    table.add_column("reward", ratio=2)
    table.add_column("adv.", justify="right", no_wrap=True)
    table.expand = True
    for _, group in groupby(records, key=lambda record: record["group"]):
        for i, record in enumerate(group):
            prompt = shorten(prompt_text(record["prompt"])) if i == 0 else ""
            scores = [f"{name} {number(value)}" for name, value in record["rewards"].items()]
            table.add_row(
                Text(printable(prompt)),
                Text(printable(shorten(completion_text(record)))),
                Text(printable("\n".join([number(record["reward"]), *scores]))),
                Text(number(record["advantage"])),
            )
    return table


def completion_lines(
    step: int, records: Sequence[Mapping[str, Any]], more: int = 0
) -> Iterator[str]:
    """The same in lines."""
    yield f"completions of step {step}"
    for _, group in groupby(records, key=lambda record: record["group"]):
        for i, record in enumerate(group):
            if i == 0:
                yield f"  row {record['row']}: {one_line(prompt_text(record['prompt']))}"
            scores = "  ".join(f"{n} {number(v)}" for n, v in record["rewards"].items())
            yield (
                f"    reward {number(record['reward'])}  ({scores})  "
                f"advantage {number(record['advantage'])}  "
                f"{record['length']} tokens, {record['finish_reason']}: "
                f"{one_line(completion_text(record))}"
            )
    if more:
        yield f"  {_left_out(more)}"


def _left_out(more: int) -> str:
    return f"{more} more are in completions/"
