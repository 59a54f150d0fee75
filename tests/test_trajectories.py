"""Whole tiny runs are what they were when their numbers were written down."""

from __future__ import annotations

import json

import pytest
import trajectories

GOLDEN = json.loads(trajectories.GOLDEN.read_text())
# Another CPU rounds otherwise, and Adam divides by the size of a gradient: what is next to nothing
# is much in a weight. A run of another computation is off by more than that everywhere.
TOLERANCE = {"rel": 5e-4, "abs": 2e-5}


def test_every_run_has_its_numbers() -> None:
    assert list(GOLDEN) == list(trajectories.CASES)


@pytest.mark.parametrize("name", trajectories.CASES)
def test_a_run_is_what_it_was(name: str) -> None:
    found, golden = trajectories.run(name), GOLDEN[name]
    assert len(found.rows) == len(golden["rows"])
    for row, wanted in zip(found.rows, golden["rows"], strict=True):
        assert row == pytest.approx(wanted, **TOLERANCE)
    assert found.weights == pytest.approx(golden["weights"], **TOLERANCE)
