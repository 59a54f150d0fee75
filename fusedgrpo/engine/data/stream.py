"""Which prompts come next: a permutation per epoch, a function of (seed, epoch) and a cursor."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.seeding import derive


class PromptStream:
    """Endless passes over ``data``; ``cursor`` counts the prompts handed out and is all its state.

    Every prompt comes exactly once in each epoch; a rollout may span two of them. share: of the run
    that is over, for streams that go by it; whoever asks for prompts sets it before.
    """

    share = 0.0

    def __init__(self, data: PromptDataset, *, seed: int, shuffle: bool):
        self.data = data
        self.seed = seed
        self.shuffle = shuffle
        self.cursor = 0
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def epoch(self) -> float:
        return self.cursor / len(self.data)

    def peek(self, count: int) -> list[Example]:
        """The next ``count`` prompts; ``cursor`` moves when they were used, not before."""
        examples = []
        for position in range(self.cursor, self.cursor + count):
            epoch, index = divmod(position, len(self.data))
            examples.append(self.data[self._permutation(epoch)[index]])
        return examples

    def observe(self, examples: Sequence[Example], rewards: np.ndarray) -> None:
        """Take in the rewards of the next prompts' groups, ``[P, G]``; no use here."""

    def state(self) -> dict[str, Any] | None:
        """The state beside ``cursor``, for JSON."""
        return None

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """The inverse of ``state``."""

    def metrics(self) -> dict[str, float]:
        """How prompts are chosen, for a row of metrics."""
        return {}

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.data)))
            if self.shuffle:
                random.Random(derive(self.seed, "order", epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]
