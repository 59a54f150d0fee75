"""math_answer: which texts count as the reference answer."""

from __future__ import annotations

import threading

import pytest

from fusedgrpo.engine.rewards.math_answer import is_correct, latex_verdict, text_of


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("<think>8*2</think><answer> 16 </answer>", "16"),
        ("<answer>北京</answer>", "北京"),  # no mathematics: to the letter
        ("北京\n", "北京"),
        ("<answer>x = 4</answer>", "x = 4"),
        ("<answer>4</answer>", "x = 4"),
        ("<answer>0.5</answer>", r"\frac{1}{2}"),
        ("The answer is 1,000.", "1000"),
        (r"So \boxed{\frac{1}{3}}", r"$\frac{1}{3}$"),
        ("<answer>72</answer>", "It is $3 a day at $2.\n#### 72"),
        (r"<answer>$2 \times 10^3$</answer>", "2000"),
        ("<answer>-3</answer>", "-3"),
        ("<think>maybe 5</think> 7", "7"),
        ("2 + 2 = 4", "4"),
        ("8 / 2 = 4", "4"),
        ("<answer>1/2</answer>", "50%"),
    ],
)
def test_right_answers(completion: str, reference: str) -> None:
    assert is_correct(completion, reference)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("<answer>17</answer>", "16"),
        ("16 <answer>17</answer>", "16"),  # the tag says what the answer is
        ("<answer>17</answer><answer>16</answer>", "16"),  # the first tag counts
        ("<think>16</think> 17", "16"),
        ("<answer></answer>", "16"),
        ("", "16"),
        ("上海", "北京"),
        ("<answer>3 + 5</answer>", "8"),  # the question again
        ("<answer>(3 + 5) × 2</answer>", "16"),
        (r"$(3+5) \times 2$", "16"),
        ("<answer>8 / 2</answer>", "4"),
        (r"$\frac{8}{2}$", "4"),
    ],
)
def test_wrong_answers(completion: str, reference: str) -> None:
    assert not is_correct(completion, reference)


def test_an_expression_may_answer_an_expression() -> None:
    assert is_correct("<answer>$y + x$</answer>", "$x + y$")


def test_works_outside_the_main_thread() -> None:
    found: list[object] = []

    def check() -> None:
        found.append(is_correct("It is 0.5", r"\frac{1}{2}"))
        found.append(latex_verdict("$2$", r"\boxed{2}")[0])

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert found == [True, 1.0]


def test_text_of_strings_and_messages() -> None:
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": "b"}]) == "b"
    assert text_of([{"role": "assistant", "content": None}]) == ""
    assert text_of([]) == ""
