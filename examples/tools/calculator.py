"""The calculator of calculator.yaml, and its reward."""

from __future__ import annotations

import re


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def right_product(completions, product, **columns):
    """1 if the policy's last message ends with the product, else 0. Nothing for a call as such:
    one that helps is rewarded by what it helps to."""
    return [
        float(last_number(messages[-1]) == right)
        for messages, right in zip(completions, product, strict=True)
    ]


def last_number(message):
    """The last number that the policy says; None for an answer of a tool, and without a number."""
    numbers = re.findall(r"\d+", message["content"].replace(",", ""))
    return int(numbers[-1]) if numbers and message["role"] == "assistant" else None
