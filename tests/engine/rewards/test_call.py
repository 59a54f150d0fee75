"""RewardCall: what a function is called with, and which answers are rewards."""

from __future__ import annotations

import asyncio
import enum
import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from fusedgrpo.engine.rewards.call import Batch, CallFailed, Reply, RewardCall, callable_name
from fusedgrpo.errors import RewardError


def batch(count: int = 4, **columns: list[Any]) -> Batch:
    return Batch(
        prompts=["p"] * count,
        completions=[f"c{i}" for i in range(count)],
        completion_ids=[[i] for i in range(count)],
        columns=columns,
        trainer_state=None,
        rows=[i + 10 for i in range(count)],
    )


def call(function: Any, given: Batch | None = None, **kwargs: Any) -> Reply:
    return RewardCall(function, kwargs)(given or batch())


def test_arguments_follow_the_convention() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * 4

    call(spy, batch(solution=list("abcd")), strict=True)
    assert seen.pop("log_extra") and seen.pop("log_metric")
    assert seen == {
        "prompts": ["p"] * 4,
        "completions": ["c0", "c1", "c2", "c3"],
        "completion_ids": [[0], [1], [2], [3]],
        "trainer_state": None,
        "solution": list("abcd"),
        "strict": True,
    }


def test_a_function_without_var_keywords_gets_what_it_names() -> None:
    def narrow(completions: list[str], solution: list[str]) -> list[bool]:
        return [c == s for c, s in zip(completions, solution, strict=True)]

    assert call(narrow, batch(solution=["c0", "x", "c2", "x"])).values == [1.0, 0.0, 1.0, 0.0]


def test_a_missing_column_is_named_with_those_that_exist() -> None:
    def needs(completions: list[str], references: list[str], **kwargs: Any) -> list[float]:
        return [0.0] * 4

    with pytest.raises(RewardError, match=r"'needs' needs 'references'.*columns: reference, x"):
        call(needs, batch(reference=[0] * 4, x=[0] * 4))


def test_a_function_cannot_damage_the_batch() -> None:
    def greedy(completions: list[str], solution: list[int], **kwargs: Any) -> list[float]:
        completions.clear()
        solution.clear()
        return [0.0] * 4

    given = batch(solution=[1] * 4)
    call(greedy, given)
    assert len(given.completions) == 4 and given.columns["solution"] == [1] * 4


@pytest.mark.parametrize(
    "output",
    [
        [1, 0.5, True, None],
        (1, 0.5, True, None),
        [torch.tensor(1), torch.tensor(0.5), torch.tensor(True), None],
        [np.int64(1), np.float32(0.5), np.bool_(True), None],
        [Fraction(1), Fraction(1, 2), 1.0, None],
        np.array([1, 0.5, 1, None], dtype=object),
    ],
    ids=["list", "tuple", "tensors", "numpy scalars", "fractions", "array"],
)
def test_all_kinds_of_numbers_are_rewards(output: Any) -> None:
    reply = call(lambda **kwargs: output)
    assert reply.values[:3] == [1.0, 0.5, 1.0] and math.isnan(reply.values[3])
    assert all(type(value) is float for value in reply.values)
    assert not reply.failures


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [float, np.float32, np.array, torch.tensor])
def test_a_reward_that_is_not_finite_is_a_failure_and_not_a_none(kind: Any, value: float) -> None:
    whole = [0.0, value, 0.0, 1.0]
    for output in ([0.0, kind(value), None, 1.0], whole if kind is float else np.array(whole)):
        reply = call(lambda answer=output, **kwargs: answer)
        assert list(reply.failures) == [1] and "no finite number" in reply.failures[1]
        assert math.isnan(reply.values[1]) and reply.values[3] == 1.0


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ([1.0], "returned 1, expected 4"),
        ([1.0] * 5, "returned 5, expected 4"),
        ([], "returned 0, expected 4"),
        (None, r"returned None \(NoneType\), expected a list of 4 numbers"),
        (0.5, r"returned 0.5 \(float\), expected a list of 4"),
        (torch.tensor(0.5), r"\(Tensor\), expected a list of 4"),
        ("good", r"returned 'good' \(str\), expected a list of 4"),
        ({"a": 1}, r"\(dict\), expected a list of 4"),
        ([0, "1.0", 0, 0], r"returned '1.0' \(str\) for completion 1 \(data row 11\)"),
        ([0, 0, [1.0], 0], r"returned \[1.0\] \(list\) for completion 2 \(data row 12\)"),
        (torch.zeros(4, 1), r"\(Tensor\) for completion 0 \(data row 10\)"),
        ([0, 0, 0, 1j], r"returned 1j \(complex\) for completion 3"),
        ({0.0, 1.0, 2.0, 3.0}, r"\(set\), expected a list of 4"),
        ([0, 2e6, 0, 0], "returned 2000000.0 for completion 1"),
        ([10**400, 0, 0, 0], "for completion 0.*at most 1e\\+06"),
        ([10**5000, 0, 0, 0], "for completion 0.*at most 1e\\+06"),
    ],
)
def test_anything_else_is_refused(output: Any, told: str) -> None:
    def judge(**kwargs: Any) -> Any:
        return output

    with pytest.raises(RewardError, match=told) as caught:
        call(judge)
    assert "'judge'" in str(caught.value)


def test_a_million_is_allowed() -> None:
    assert call(lambda **kwargs: [1e6, -1e6, 0, 0]).values == [1e6, -1e6, 0, 0]


def test_a_coroutine_is_no_reward() -> None:
    async def late(**kwargs: Any) -> list[float]:
        return [0.0] * 4

    coroutine = late()
    with pytest.raises(RewardError, match="expected a list of 4"):
        call(lambda **kwargs: coroutine)
    coroutine.close()


def test_failures_say_what_and_where() -> None:
    def broken(**kwargs: Any) -> list[float]:
        return [1 / 0]

    with pytest.raises(CallFailed, match=r"ZeroDivisionError: .*\(.*test_call.py:\d+\)") as caught:
        call(broken)
    assert "return [1 / 0]" in caught.value.details and caught.value.repeatable


def test_a_generator_that_fails_is_a_failure() -> None:
    def lazy(completions: list[str], **kwargs: Any) -> Any:
        return (int(completion) for completion in completions)

    with pytest.raises(CallFailed, match="ValueError"):
        call(lazy)


def test_async_functions_are_recognised_and_awaited() -> None:
    async def late(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    class Judge:
        async def __call__(self, **kwargs: Any) -> list[float]:
            return [2.0] * 4

    for function in (late, functools.partial(late, extra=1), Judge()):
        assert RewardCall(function).is_async
    assert not RewardCall(test_a_million_is_allowed).is_async
    assert asyncio.run(RewardCall(late).call_async(batch())).values == [1.0] * 4
    assert asyncio.run(RewardCall(Judge()).call_async(batch())).values == [2.0] * 4


def test_logged_values_come_back_plain() -> None:
    class Colour(enum.IntEnum):
        RED = 1

    def logs(log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_extra("seen", [1, None, torch.tensor(2.0), {3}])
        log_extra("colour", [Colour.RED] * 4)
        log_metric("rate", np.float32(0.5))
        log_metric("rate", 1)
        return [0.0] * 4

    reply = call(logs)
    assert reply.extra == {"seen": [1, None, 2.0, "{3}"], "colour": [1] * 4}
    assert type(reply.extra["colour"][0]) is int
    assert reply.metrics == {"rate": [0.5, 1.0]}


def test_log_extra_must_have_one_value_for_each_completion() -> None:
    def logs(log_extra: Any, **kwargs: Any) -> list[float]:
        log_extra("seen", [1])
        return [0.0] * 4

    with pytest.raises(RewardError, match=r"'logs' called log_extra\('seen', ...\) with 1 values"):
        call(logs)


def test_constant_arguments_are_checked() -> None:
    def narrow(completions: list[str], threshold: float = 0.5) -> list[float]:
        return [threshold] * len(completions)

    assert call(narrow, threshold=2.0).values == [2.0] * 4
    with pytest.raises(
        RewardError, match=r"'narrow'.*takes no 'treshold'. Did you mean 'threshold'"
    ):
        call(narrow, treshold=2.0)
    with pytest.raises(RewardError, match="'completions' is given by the trainer"):
        call(narrow, completions=[])
    with pytest.raises(RewardError, match="'threshold' is also a column"):
        call(narrow, batch(threshold=[1] * 4), threshold=2.0)


def test_a_column_may_not_hide_an_argument() -> None:
    with pytest.raises(RewardError, match=r"data column 'trainer_state'.*rename"):
        call(lambda **kwargs: [0.0] * 4, batch(trainer_state=[0] * 4))


def test_names_are_those_of_trl() -> None:
    class Judge:
        def __call__(self, **kwargs: Any) -> list[float]:
            return []

    def plain(**kwargs: Any) -> list[float]:
        return []

    partial = functools.partial(functools.partial(plain, a=1), b=2)
    assert [callable_name(f) for f in (plain, partial, Judge())] == ["plain", "plain", "Judge"]
