"""Environments that say the prompt themselves.

Here and not in their test, so that the processes that they run in import nothing else.
"""

from __future__ import annotations

import random
from typing import Any

from caller import Counter

Messages = list[dict[str, Any]]


class Asker(Counter):
    """Asks what it draws, and knows what it was given."""

    def reset(self, **row: Any) -> str:
        self.given = row
        self.start = self.count = 0
        self.asked = f"double {random.randrange(20)}"
        return self.asked


class Reader(Counter):
    """Asks by a column, and takes no other."""

    def reset(self, number: int) -> str:  # type: ignore[override]
        self.start = self.count = 0
        return f"double {number}"


class Measurer(Counter):
    """Says how many words its prompt has."""

    def reset(self, prompt: Messages, **row: Any) -> str:  # type: ignore[override]
        self.start = self.count = 0
        return f" {len(prompt[-1]['content'].split())}"
