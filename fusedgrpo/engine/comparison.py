"""Two policies on the same prompts: means with intervals, and the difference prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 10_000
_AT_ONCE = 500


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and the interval in which 95% of the means over resampled prompts are.
    prompts: how many had a value. NaN where none had."""

    mean: float
    low: float
    high: float
    prompts: int

    def to_record(self) -> dict[str, float | int | None]:
        numbers = {"mean": self.mean, "low": self.low, "high": self.high}
        known = {name: None if math.isnan(v) else v for name, v in numbers.items()}
        return {**known, "prompts": self.prompts}

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def prompt_means(values: Tensor, group_ids: Sequence[int]) -> Tensor:
    """``[P]`` float64: the mean of each prompt's completions. values: ``[B]``, NaN where there is
    none; a prompt without any is NaN."""
    groups = torch.tensor(group_ids)
    known = ~values.isnan()
    size = int(groups.max()) + 1 if len(groups) else 0
    sums = torch.zeros(size, dtype=torch.float64)
    sums.index_add_(0, groups[known], values[known].double())
    return sums / torch.bincount(groups[known], minlength=size)


def estimate(means: Tensor, seed: int) -> Estimate:
    """The mean of ``means [P]`` with its bootstrap interval (percentiles) over prompts.

    Prompts without a value are left out. The same seed and number of prompts give the same draws.
    """
    known = means[~means.isnan()]
    count = len(known)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        known[torch.randint(count, (_AT_ONCE, count), generator=generator)].mean(dim=1)
        for _ in range(RESAMPLES // _AT_ONCE)
    ]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.cat(drawn).quantile(ends).tolist()
    return Estimate(float(known.mean()), low, high, count)
