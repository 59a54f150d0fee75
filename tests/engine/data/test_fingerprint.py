"""A row's hash: of its values, whatever they are, and of nothing else."""

from __future__ import annotations

import datetime
import enum
import itertools
import math
import os
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedgrpo.engine.data.fingerprint import joined, row_digest


class Level(enum.IntEnum):
    HARD = 1


@dataclass
class Case:
    given: Any
    wanted: Any = None


Pair = namedtuple("Pair", "a b")


class Plain:
    def __init__(self, x: Any):
        self.x = x
        self.me = self


def values() -> list[Any]:
    """No two of them the same."""
    day = datetime.datetime(2026, 5, 1, 12)
    return [
        1, 1.0, True, "1", b"1", 1j, None, 0, -0.0, 0.0, False, "", math.nan, "nan", math.inf,
        2**70, 10**5000, "None", "\ud83d", "\ud83e", Level.HARD, Decimal(1), np.int64(1),
        np.float64(1), np.float32(1), np.array([1, 2]), np.array([1, 2], dtype=np.int8),
        np.array([[1, 2]]), np.array([1, "a"], dtype=object), torch.tensor([1, 2]),
        torch.tensor([1.0]).bfloat16(), torch.tensor(1), [], (), {}, set(), [1, 2], [2, 1], (1, 2),
        [[1], 2], [[1, 2]], [1, "2"], ["1", 2], ["12"], ["1", "2"], {1, 2}, frozenset({3}),
        {1: "x", "b": 2}, {"1": "x", "b": 2}, {(0, 1): "wall"}, {"a": None}, {"a": {"b": 1}},
        {None: 1}, {True: 1}, {b"k": 1}, {day: 1}, {math.nan: 1}, {frozenset({1}): 1}, day,
        day.date(), day.replace(tzinfo=datetime.UTC), datetime.timedelta(1), Path("a"), range(3),
        Case(1), Case("1"), Pair(1, 2), Plain(1), Plain(2), len, math,
    ]  # fmt: skip


def test_different_values_have_different_digests_and_equal_ones_the_same() -> None:
    once, again = ([row_digest({"v": v}) for v in values()] for _ in range(2))
    assert once == again
    both = list(zip(values(), once, strict=True))
    # A column that is None is as good as none; everything else differs.
    for (a, first), (b, second) in itertools.combinations(both, 2):
        assert first != second, (a, b)
    assert row_digest({"v": None}) == row_digest({})


def test_mappings_and_sets_have_no_order_and_sequences_have() -> None:
    one, other = {"a": 1, 2: [{"x": 1, "y": 2}]}, {2: [{"y": 2, "x": 1}], "a": 1}
    assert row_digest({"v": one, "w": 1}) == row_digest({"w": 1, "v": other})
    assert row_digest({"v": set("abcdefgh")}) == row_digest({"v": set("hgfedcba")})
    rows = [row_digest({"v": i}) for i in range(3)]
    assert joined(rows) != joined(rows[::-1])


def test_what_cannot_be_stored_counts_by_its_class() -> None:
    assert row_digest({"v": threading.Lock()}) == row_digest({"v": threading.Lock()})
    assert row_digest({"v": (i for i in "a")}) == row_digest({"v": (i for i in "b")})
    loop: list[Any] = [1]
    loop.append(loop)
    assert row_digest({"v": loop}) != row_digest({"v": [1, [1]]})


def test_it_is_the_same_in_another_process() -> None:
    program = "import test_fingerprint as t; print(t.of_all())"
    told = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        told.add(
            subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
        )
    assert len(told) == 1 and len(told.pop()) == 64


def of_all() -> str:
    named = [v for v in values() if type(v).__module__ != __name__]
    return joined(row_digest({"v": v, "w": {str(v) for v in range(20)}}) for v in named)
