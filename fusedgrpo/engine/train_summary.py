"""The end of a run in numbers, as transformers' trainers return and log them."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers.trainer_utils import speed_metrics


class TrainSummary:
    """Counts the steps of one call of ``train``, which begins now after step ``done``.

    samples_per_step: completions.
    """

    def __init__(self, done: int, samples_per_step: int):
        self.done = done
        self.samples_per_step = samples_per_step
        self.started = time.time()
        self.losses: list[float] = []

    def add(self, loss: float) -> None:
        """Count a step; one that was skipped because its loss was not finite has none."""
        if math.isfinite(loss):
            self.losses.append(loss)

    @property
    def loss(self) -> float:
        """The mean over the steps; 0 if there was none."""
        return math.fsum(self.losses) / max(len(self.losses), 1)

    def metrics(self, step: int) -> dict[str, Any]:
        """After ``step``: ``train_runtime`` in seconds, completions and steps per second,
        ``train_loss``."""
        steps = step - self.done
        measured = speed_metrics(  # type: ignore[no-untyped-call]
            "train", self.started, num_samples=steps * self.samples_per_step, num_steps=steps
        )
        return {**measured, "train_loss": self.loss}
