"""Is this text the reference answer? The comparison that the accuracy rewards share.

math-verify stops runaway expressions with ``signal.alarm``, which works in a main thread only:
in other threads its limits are off.
"""

from __future__ import annotations

import logging
import re
import threading
from typing import Any

PARSE_SECONDS = 5
VERIFY_SECONDS = 2

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?%?")
_TIMES = r"(?:[*×·⋅]|\\times|\\cdot)(?!\s*10\s*\^)"  # 2 x 10^3 is a number, not a sum to do
_WHOLE_NUMBER = re.compile(r"[-+]?\d[\d,]*")
_OPEN_DIVISION = re.compile(r"[/÷]|\\div|frac")
_OPEN_SUM = re.compile(rf"[\d)}}]\s*(?:[-+]|{_TIMES})\s*[\d({{\\]")


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion: the string, or the content of its first message."""
    if isinstance(completion, str):
        return completion
    return (completion[0].get("content") or "") if completion else ""


def is_correct(completion: str, reference: str) -> bool:
    """Whether ``completion`` answers ``reference``.

    The answer is what stands between the first ``<answer>`` and ``</answer>``; without these
    tags, all that follows the last ``</think>``. It is right if it is the reference to the
    letter (blanks around it aside) or is mathematically equal to it. Of a reference with
    ``####`` (GSM8K), what follows counts.
    """
    reference = reference.rsplit("####", 1)[-1].strip()
    tagged = _ANSWER.search(completion)
    answer = tagged.group(1) if tagged else completion.rsplit("</think>", 1)[-1]
    return answer.strip() == reference or equivalent(reference, answer)


def equivalent(reference: str, answer: str) -> bool:
    """Mathematical equality by math-verify, which takes the last expression that it finds.

    Where the reference is a number, an answer that is still a sum to be done ("3 + 5" for 8) is
    wrong, and so is a division for a whole number: they would reward repeating the question.
    """
    math_verify, parse_seconds, verify_seconds = _math_verify()
    gold = math_verify.parse(reference, parsing_timeout=parse_seconds)
    found = math_verify.parse(answer, parsing_timeout=parse_seconds) if gold else []
    if not found:
        return False
    text = str(found[-1])
    if _NUMBER.fullmatch(reference) and _OPEN_SUM.search(text):
        return False
    if _WHOLE_NUMBER.fullmatch(reference) and _OPEN_DIVISION.search(text):
        return False
    return bool(math_verify.verify(gold, found, timeout_seconds=verify_seconds))


def latex_verdict(reference: str, answer: str) -> tuple[float | None, str, str]:
    """TRL's rule: the answer must be LaTeX (a box first, then an environment).

    Returns the reward (None if the reference cannot be parsed) and what was parsed of the
    reference and of the answer.
    """
    from latex2sympy2_extended import NormalizationConfig

    math_verify, parse_seconds, verify_seconds = _math_verify()
    gold = math_verify.parse(reference, parsing_timeout=parse_seconds)
    if not gold:
        return None, "[unparseable]", "[skipped]"
    latex = math_verify.LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    found = math_verify.parse(
        answer,
        extraction_config=[latex],
        extraction_mode="first_match",
        parsing_timeout=parse_seconds,
    )
    right = math_verify.verify(gold, found, timeout_seconds=verify_seconds)
    return float(right), str(gold), str(found) if found else "[unparseable]"


def _math_verify() -> tuple[Any, int | None, int | None]:
    """The library, and the seconds that it may take to parse and to verify."""
    import math_verify

    # It warns of every limit that is hit or switched off, once per completion.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        return math_verify, PARSE_SECONDS, VERIFY_SECONDS
    return math_verify, None, None
