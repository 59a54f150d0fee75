"""The steps of a run in a few rows, for a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.table import Table

from fusedgrpo.engine.reporting.formatting import number, percent
from fusedgrpo.engine.reporting.metrics_log import Row, finite, mean_row

MOST_ROWS = 10
COLUMNS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "eval_reward": "eval_reward",
    "completions/mean_length": "length",
    "completions/clipped_ratio": "clipped",
    "tools/call_frequency": "calls",
    "tools/failure_frequency": "errors",
    "kl": "kl",
    "entropy": "entropy",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "step_time": "s/step",
}


def metrics_table(rows: Sequence[Row]) -> Table:
    """At most ``MOST_ROWS`` rows, each the mean of steps that follow each other; columns that no
    step has are left out."""
    steps = [row for row in rows if row["step"] > 0]
    known = mean_row(steps)
    columns = {key: title for key, title in COLUMNS.items() if key in known}
    table = Table(title="The run", title_justify="left")
    for title in ("steps", *columns.values()):
        table.add_column(title, justify="right", no_wrap=True)
    count = min(MOST_ROWS, len(steps))
    edges = [len(steps) * i // count for i in range(count + 1)] if count else []
    for start, end in pairwise(edges):
        part = steps[start:end]
        first, last = part[0]["step"], part[-1]["step"]
        mean = mean_row(part)
        shares = {"completions/clipped_ratio", "tools/failure_frequency"}
        table.add_row(
            str(first) if first == last else f"{first}-{last}",
            *((percent if key in shares else number)(finite(mean.get(key))) for key in columns),
        )
    return table
