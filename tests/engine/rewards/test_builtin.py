"""The built-in reward functions, by themselves and against TRL's."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from fusedgrpo.engine.rewards import builtin
from fusedgrpo.errors import RewardError


def messages(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("column", builtin.REFERENCE_COLUMNS)
def test_accuracy_finds_its_reference_column(column: str) -> None:
    assert builtin.accuracy(["<answer>4</answer>", "5"], **{column: ["4", "4"]}) == [1.0, 0.0]


def test_accuracy_prefers_solution_and_takes_numbers() -> None:
    assert builtin.accuracy(["4", "3.50"], output=["1", "1"], solution=[4, 3.5]) == [1.0, 1.0]


def test_accuracy_does_not_apply_without_a_reference() -> None:
    references = [None, "", float("nan"), "1"]
    assert builtin.accuracy(["1"] * 4, solution=references) == [None, None, None, 1.0]


def test_accuracy_reads_messages() -> None:
    assert builtin.accuracy(messages(["<answer>4</answer>", "5"]), answer=["4", "4"]) == [1.0, 0.0]


def test_accuracy_without_a_reference_column_says_what_there_is() -> None:
    with pytest.raises(RewardError, match=r"ground_truth.*the data has: level, topic"):
        builtin.accuracy(["1"], prompts=["q"], topic=["t"], level=[1])


@pytest.mark.parametrize(
    "reference",
    [np.int64(4), np.float32(4), np.array(4), torch.tensor(4), Decimal(4), np.str_("4")],
)
def test_accuracy_takes_all_kinds_of_numbers(reference: Any) -> None:
    assert builtin.accuracy(["4", "5"], answer=[reference] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("reference", [None, math.nan, np.float64("nan"), Decimal("nan"), ""])
def test_an_empty_cell_is_no_reference(reference: Any) -> None:
    assert builtin.accuracy(["4"], answer=[reference]) == [None]


def test_accuracy_refuses_a_reference_that_is_no_text() -> None:
    with pytest.raises(RewardError, match=r"column 'solution' holds \['4'\] \(list\)"):
        builtin.accuracy(["4"], solution=[["4"]])


def test_accuracy_logs_the_reference() -> None:
    logged = {}
    builtin.accuracy(["4"], solution=[4], log_extra=logged.__setitem__)
    assert logged == {"reference": ["4"]}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>a\nb</think>\n\n<answer>\nc\n</answer>\n", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<answer>b</think></answer>", 0.0),
        ("Well, <think>a</think> so <answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer> and more", 1.0),
        ("", 0.0),
    ],
)
def test_format(text: str, reward: float) -> None:
    assert builtin.format([text]) == [reward]
    assert builtin.format(messages([text])) == [reward]


def test_format_takes_no_time_over_a_pathological_text() -> None:
    text = "<think>" + "</think".join([" "] * 50_000) + "</think><answer>" + "<" * 50_000
    assert builtin.format([text]) == [0.0]  # a backtracking pattern would not come back


def test_cosine_rewards_short_right_and_long_wrong_completions() -> None:
    reward = builtin.get_cosine_scaled_reward(max_len=10)
    completions = [r"\boxed{1}"] * 3 + [r"\boxed{2}"] * 3
    ids = [[], [0] * 5, [0] * 20] * 2
    values = reward(completions=completions, solution=["1"] * 6, completion_ids=ids)
    assert values == pytest.approx([1.0, 0.75, 0.5, -1.0, -0.75, -0.5])


def test_soft_overlong_punishment_falls_from_zero_to_minus_one() -> None:
    reward = builtin.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    lengths = [0, 80, 90, 100, 101]
    assert reward(completion_ids=[[0] * n for n in lengths]) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_repetition_penalty_is_the_share_of_repeated_ngrams() -> None:
    reward = builtin.get_repetition_penalty_reward(ngram_size=2, max_penalty=-2.0)
    ids = [[], [1], [1, 2, 3, 4], [5, 5, 5, 5, 5]]
    assert reward(completion_ids=ids) == [0.0, 0.0, 0.0, -1.5]


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("cosine_scaled", {"max_len": 0}, "max_len is 0"),
        ("repetition_penalty", {"max_penalty": 1.0}, "max_penalty is 1.0"),
        ("repetition_penalty", {"ngram_size": 0}, "ngram_size is 0"),
        (
            "soft_overlong_punishment",
            {"max_completion_len": 5, "soft_punish_cache": 6},
            "soft_punish_cache is 6",
        ),
    ],
)
def test_factories_refuse_senseless_arguments(name: str, arguments: dict, told: str) -> None:
    with pytest.raises(RewardError, match=told):
        builtin.FACTORIES[name](**arguments)


TEXTS = [
    r"<think>a</think> So \boxed{\frac{1}{3}}",
    r"<think>a \boxed{\frac{1}{3}}",
    r"\boxed{0.5}",
    "the answer is 16",
    "$16$",
    r"<think>x</think><think>y</think> $\frac{2}{6}$ m",
    "\n<think>a</think> $x$",
    "",
]
SOLUTIONS = [r"\frac{1}{3}", r"\frac{1}{3}", r"$\frac{1}{2}$", "16", "16", "1/3", "text", "7"]
IDS = [[1] * 3, [1, 2, 3, 1, 2, 3], [4], [], [1, 2] * 20, list(range(30)), [1, 1, 1], [9] * 50]


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("accuracy_reward", None),
        ("reasoning_accuracy_reward", None),
        ("think_format_reward", None),
        ("get_cosine_scaled_reward", {"max_len": 20}),
        (
            "get_cosine_scaled_reward",
            {
                "max_len": 7,
                "min_value_wrong": -3,
                "max_value_wrong": 0,
                "min_value_correct": 0.1,
                "max_value_correct": 4,
            },
        ),
        ("get_repetition_penalty_reward", {}),
        ("get_repetition_penalty_reward", {"ngram_size": 1, "max_penalty": -0.3}),
        ("get_soft_overlong_punishment", {"max_completion_len": 40, "soft_punish_cache": 15}),
        ("get_soft_overlong_punishment", {"max_completion_len": 40, "soft_punish_cache": 0}),
    ],
)
def test_values_equal_trl(name: str, arguments: dict | None) -> None:
    theirs = getattr(pytest.importorskip("trl.rewards"), name)
    ours = getattr(builtin, name)
    if arguments is not None:
        theirs, ours = theirs(**arguments), ours(**arguments)
    given = {"solution": SOLUTIONS, "completion_ids": IDS}
    expected = theirs(completions=messages(TEXTS), **given)
    assert ours(completions=messages(TEXTS), **given) == pytest.approx(expected, abs=1e-12)
    assert ours(completions=TEXTS, **given) == pytest.approx(expected, abs=1e-12)
    assert ours.__name__ == theirs.__name__


def test_reasoning_accuracy_uses_the_given_delimiters() -> None:
    texts = [r"a [end] \boxed{1}", r"a </think> \boxed{1}"]
    values = builtin.reasoning_accuracy_reward(texts, ["1", "1"], reasoning_delimiters=["[end]"])
    assert values == [1.0, 0.0]
