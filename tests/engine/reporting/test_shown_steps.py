"""Which completions a run shows, and what it says of those that it does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from fusedgrpo.engine.reporting.completions_table import completion_lines, completions_table
from fusedgrpo.engine.reporting.shown_steps import ShownCompletions


class Screen:
    def __init__(self) -> None:
        self.shown: list[tuple[int, int, int]] = []

    def completions(self, step: int, records: list[Any], more: int) -> None:
        self.shown.append((step, len(records), more))


def shown(rollouts: Iterable[int], limit: int | None, steps: int) -> list[tuple[int, int, int]]:
    screen = Screen()
    callback = ShownCompletions(screen, limit, steps)  # type: ignore[arg-type]
    for step in rollouts:
        callback.on_rollout(step, [{}] * 5)
    return screen.shown


@pytest.mark.parametrize(
    ("rollouts", "steps", "expected"),
    [
        (range(1, 8), 1, [1, 2, 3, 4, 5, 6, 7]),
        (range(1, 8), 3, [1, 4, 7]),
        (range(1, 30, 4), 10, [1, 13, 21]),  # a rollout is four steps
        (range(1, 30, 4), 3, list(range(1, 30, 4))),
        (range(12, 22), 10, [12, 21]),  # of a run that goes on
    ],
)
def test_one_rollout_in_so_many_steps_is_shown(
    rollouts: range, steps: int, expected: list[int]
) -> None:
    assert [step for step, _, _ in shown(rollouts, None, steps)] == expected


def test_no_more_than_the_limit_is_shown_and_the_rest_is_counted() -> None:
    assert shown([1], 2, 1) == [(1, 2, 3)]
    assert shown([1], None, 1) == shown([1], 9, 1) == [(1, 5, 0)]


def test_how_many_are_left_out_is_said_in_a_table_and_in_lines() -> None:
    record = {
        "group": 0, "row": 1, "prompt": "p", "completion": "c", "finish_reason": "stop",
        "length": 3, "rewards": {}, "reward": 1.0, "advantage": 0.0,
    }  # fmt: skip
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as printed:
        console.print(completions_table(1, [record], 7))
    assert "7 more are in completions/" in printed.get()
    assert list(completion_lines(1, [record], 7))[-1] == "  7 more are in completions/"
    with console.capture() as printed:
        console.print(completions_table(1, [record]))
    assert "more" not in printed.get() and "more" not in " ".join(completion_lines(1, [record]))
