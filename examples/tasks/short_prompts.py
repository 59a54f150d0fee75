"""Questions of reasoning-gym as short plain text behind an answered one, for a small model.

SmolLM2-135M answers "12 + 25 = 37, 3 + 4 =" with a number, and the same question as a turn of a
chat with a sentence: there would be next to nothing to reward. ``dataset_format`` names a function
of this file in the recipe beside it.
"""

from __future__ import annotations


def sums(row):
    """``State the final answer to the following arithmetic problem: 3 + 4 =``"""
    return plain(row, "12 + 25 = 37\n{}")


def products(row):
    """``Solve the following multiplication: 3 * 4. Give only the result as your final answer.``"""
    return plain(row, "12 * 3 = 36\n{} =")


def arithmetic(row):
    """Rows of both tasks."""
    return products(row) if row["task"] == "products" else sums(row)


def plain(row, prompt):
    """The row, so that its verifier still finds the question, with what it asks about in prompt."""
    asked = row["prompt"][0]["content"].partition(": ")[2].partition(". ")[0]
    return {**row, "prompt": prompt.format(asked)}
