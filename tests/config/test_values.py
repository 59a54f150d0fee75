from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fusedgrpo.config.values import read_value, takes_text

Mode = Literal["no", "steps"]


class Strategy(str, Enum):  # noqa: UP042 - as the enums of transformers are
    STEPS = "steps"


@pytest.mark.parametrize(
    ("value", "hint", "read"),
    [
        ("1e-5", float, 1e-5),
        (1, float, 1.0),
        (np.float32(0.5), float, 0.5),
        ("8", int, 8),
        (8.0, int, 8),
        (np.int64(8), int, 8),
        (2**63 + 1, int, 2**63 + 1),
        ("True", bool, True),
        ("off", bool, False),
        (None, float | None, None),
        (Path("a/b"), str, "a/b"),
        (False, Mode, "no"),
        (Strategy.STEPS, Mode, "steps"),
        ("a, b", list[str], ["a", "b"]),
        ("1, 0.5", list[float] | None, [1.0, 0.5]),
        (["a"], tuple[str, ...], ("a",)),
        ('{"a": 1}', dict[str, Any], {"a": 1}),
        (True, str | bool | None, True),
        ("auto", str | bool | None, "auto"),
        (["a"], str | list[str], ["a"]),
    ],
)
def test_values_are_read_as_their_type(value: object, hint: Any, read: object) -> None:
    result = read_value(value, hint, {})
    assert result == read
    assert type(result) is type(read)


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        ([1, 2], float, "expected a number, got [1, 2] (list)"),
        ("fast", float, "expected a number, got 'fast'"),
        (True, int, "expected an integer, got True (bool)"),
        (True, float, "expected a number, got True (bool)"),
        (2.5, int, "expected an integer, got 2.5 (float)"),
        ("2.5", int, "expected an integer, got '2.5'"),
        (1, bool, "expected true or false, got 1 (int)"),
        ("maybe", bool, "expected true or false, got 'maybe'"),
        (None, int, "expected an integer, got null"),
        (3, str, "expected text, got 3 (int)"),
        ("stepz", Mode, "expected one of no, steps, got 'stepz'. Did you mean 'steps'?"),
        (True, Mode, "expected one of no, steps, got True"),
        ([1, "x"], list[float], "expected a list of numbers, got [1, 'x']"),
        ("[1]", dict[str, Any], "expected a mapping, got '[1]'"),
        ({1: 2}, dict[str, Any], "expected a mapping"),
        (2.5, int | None, "expected an integer or null, got 2.5"),
    ],
)
def test_other_types_are_refused(value: object, hint: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_value(value, hint, {})
    assert said in str(caught.value)


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), float("inf"), "nan"])
def test_numbers_outside_the_range_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a number or null >= 0 and < 1, got"):
        read_value(value, float | None, {">=": 0, "<": 1})


@pytest.mark.parametrize("value", [0, 0.999, None])
def test_numbers_inside_the_range_are_taken(value: float | None) -> None:
    assert read_value(value, float | None, {">=": 0, "<": 1}) == value


def test_numbers_in_a_list_must_be_finite() -> None:
    with pytest.raises(ValueError, match="a list of numbers"):
        read_value([1, float("nan")], list[float] | None, {})


def test_text_is_parsed_only_where_the_option_takes_none() -> None:
    assert takes_text(str | None) and takes_text(Mode) and takes_text(Any)
    assert not takes_text(float | None)
    assert not takes_text(list[str])
