"""A calculator, and what is a right answer."""

import re


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def right_product(completions, product, **columns):
    """1 if the last number of the last message is the product, else 0."""
    rewards = []
    for messages, right in zip(completions, product, strict=True):
        said = messages[-1]
        numbers = re.findall(r"\d+", said["content"].replace(",", ""))
        rewards.append(float(bool(numbers) and int(numbers[-1]) == right))
    return rewards
