"""An environment of tokens alone: it answers each turn with what a script says, when it pleases."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from fusedgrpo.engine.rollout.turns import Answer, Finished, Place

# From a place and the number of the turn that has ended to the answer; None ends the completion.
Script = Callable[[Place, int], Answer]


class ScriptedTurns:
    """most: tokens of a completion. patience: an answer comes after up to so many questions for
    it, by a generator of its own with ``seed``."""

    def __init__(self, script: Script, most: int, *, patience: int = 0, seed: int = 0):
        self.script = script
        self.most = most
        self.patience = patience
        self.random = random.Random(seed)
        self.turn: dict[Place, int] = {}
        self.due: dict[Place, int] = {}
        self.asked: dict[Place, list[tuple[int, ...]]] = {}
        self.over: dict[Place, tuple[int, ...]] = {}
        self.begun: list[Place] = []
        self.tokens: dict[Place, int] = {}

    def begin(self, place: Place) -> None:
        assert place not in self.over
        self.begun.append(place)
        self.turn[place] = 0
        self.asked[place] = []
        self.due.pop(place, None)

    def ended(self, place: Place, ids: Sequence[int]) -> bool:
        assert place not in self.due
        answer = self.script(place, self.turn[place])
        self.asked[place].append(tuple(ids))
        if answer is not None and len(ids) + len(answer) >= self.most:
            return False
        self.due[place] = self.random.randint(0, self.patience)
        return True

    def answers(self, *, wait: bool) -> list[tuple[Place, Answer]]:
        found: list[tuple[Place, Answer]] = []
        while self.due and not found:
            for place in list(self.due):
                self.due[place] -= 1
                if self.due[place] < 0:
                    del self.due[place]
                    found.append((place, self.script(place, self.turn[place])))
                    self.turn[place] += 1
            if not wait:
                break
        self.random.shuffle(found)
        return found

    def finished(self, place: Place, ids: Sequence[int]) -> Finished:
        assert place not in self.over and place not in self.due
        self.over[place] = tuple(ids)
        return Finished(" ".join(map(str, ids)), ({"role": "assistant"},), self.turn[place], 0)
