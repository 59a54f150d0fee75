"""One name for each reward function, in metrics, logs, reports and ``reward_kwargs``."""

from __future__ import annotations

from collections.abc import Sequence


def unique_labels(names: Sequence[str]) -> list[str]:
    """``names``, the second of a name with ``#2`` behind it, the third with ``#3``."""
    labels: list[str] = []
    for name in names:
        label, number = name, 1
        while label in labels or (number > 1 and label in names):
            number += 1
            label = f"{name}#{number}"
        labels.append(label)
    return labels
