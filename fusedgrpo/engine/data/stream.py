"""Which prompts come next: a permutation per epoch, a function of (seed, epoch) and a cursor."""

from __future__ import annotations

import random

from fusedgrpo.engine.data.dataset import Example, PromptDataset
from fusedgrpo.engine.seeding import derive


class PromptStream:
    """Endless passes over ``data``; ``cursor`` counts the prompts handed out and is all its state.

    Every prompt comes exactly once in each epoch; a rollout may span two of them.
    """

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

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.data)))
            if self.shuffle:
                random.Random(derive(self.seed, "order", epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]
