"""Rewards that environments give for what was done in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, cast

from fusedgrpo.engine.rewards.call import Batch, Reply


class Acted(NamedTuple):
    """Where a completion has acted: by which its environment goes, and the environment's name."""

    key: Hashable
    environment: str | None


class EnvironmentReward:
    """The ``get_reward`` of one class of environments, as a reward function of TRL's: its name is
    the class's, and it does not apply to what was done in others.

    class_of: from the name of an environment to that of its class, None for one without a reward.
    rewards_of: the rewards of some environments, by their keys.
    """

    takes_environments = False

    def __init__(
        self,
        name: str,
        class_of: Callable[[str | None], str | None],
        rewards_of: Callable[[Sequence[Hashable]], Reply],
    ):
        self.name = name
        self._class_of = class_of
        self._rewards_of = rewards_of

    def start(self, batch: Batch) -> None:
        self._batch = batch

    def finish(self) -> Reply:
        acted = cast("list[Acted]", self._batch.environments or [])
        own = [i for i, one in enumerate(acted) if self._class_of(one.environment) == self.name]
        found = self._rewards_of([acted[i].key for i in own])
        values = [math.nan] * len(acted)
        for i, value in zip(own, found.values, strict=True):
            values[i] = value
        failures = {own[i]: failure for i, failure in found.failures.items()}
        return Reply(values, failures, seconds=found.seconds)

    def close(self) -> None:
        pass
