"""The entropy bonus of the loss, and the controller that sets its weight (Skywork-OR1, arXiv
2505.22312), by TRL's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class EntropyBonus:
    """coef: the weight; adaptive: it grows by ``delta`` after a step with a mean entropy of at most
    ``target``, and shrinks by it after one with more, between ``low`` and ``high``. last: the mean
    entropy of the step before."""

    coef: float = 0.0
    adaptive: bool = False
    low: float = 0.0
    high: float = 1.0
    delta: float = 0.005
    target: float = 0.2
    last: float = math.inf

    @property
    def on(self) -> bool:
        """Whether entropies are looked at, be the weight 0 for now."""
        return self.adaptive or self.coef != 0

    @property
    def weight(self) -> float:
        """The weight in the next step: none while there is entropy enough."""
        return self.coef if not self.adaptive or self.last <= self.target else 0.0

    def update(self, entropy: float) -> None:
        """After a step whose tokens had this mean entropy."""
        if not self.adaptive:
            return
        if entropy <= self.target:
            self.coef = min(self.coef + self.delta, self.high)
        else:
            self.coef = max(self.coef - self.delta, self.low)
        self.last = entropy

    def state(self) -> dict[str, Any] | None:
        """The part that changes, for a checkpoint; None where none does."""
        if not self.adaptive:
            return None
        return {"coef": self.coef, "last": self.last if math.isfinite(self.last) else None}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        if self.adaptive and state is not None:
            self.coef = state["coef"]
            self.last = math.inf if state["last"] is None else state["last"]
