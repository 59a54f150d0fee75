"""A sampler that is not ours, as the trainer calls it: what it returns is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusedgrpo.engine.rollout.checks import check_groups
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.types import Group
from fusedgrpo.errors import ConfigError


class ForeignSampler(Sampler):
    """``sampler``: anything with ``sample``; of the other methods of ``Sampler`` it may have any.

    vocabulary_size: the model's. who: the sampler, for messages. Raises ConfigError without a
    ``sample`` that can be called; ``sample`` raises SamplerError for what is no rollout.
    """

    def __init__(self, sampler: Any, vocabulary_size: int, who: str):
        check_sampler(sampler, who)
        self.sampler = sampler
        self.vocabulary_size = vocabulary_size
        self.who = who
        self._weights_changed = getattr(sampler, "weights_changed", super().weights_changed)
        self._warm_up = getattr(sampler, "warm_up", super().warm_up)

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        *,
        rows: Sequence[int] | None = None,
        first: int = 0,
    ) -> list[Group]:
        """See ``Sampler``."""
        rows = range(len(prompt_ids)) if rows is None else rows
        return check_groups(
            self.sampler.sample(prompt_ids, n, params, seed, rows=rows, first=first),
            prompt_ids,
            n,
            rows,
            max_new_tokens=params.max_new_tokens,
            vocabulary_size=self.vocabulary_size,
            who=self.who,
        )

    def weights_changed(self) -> None:
        self._weights_changed()

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        return bool(self._warm_up(prompt_ids, n, params))


def check_sampler(sampler: Any, who: str) -> None:
    """Raise ConfigError unless ``sampler`` is an object with ``sample``."""
    if isinstance(sampler, type):
        raise ConfigError(f"{who}: expected a sampler, got the class {sampler.__qualname__}.")
    if not callable(getattr(sampler, "sample", None)):
        raise ConfigError(
            f"{who}: expected an object with sample(prompt_ids, n, params, seed, rows=, first=); "
            f"a {type(sampler).__qualname__} has no such method."
        )
