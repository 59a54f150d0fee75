"""A rollout that several processes share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.turns import Turns
from fusedgrpo.engine.rollout.types import Group


class SharedSampler(Sampler):
    """A ``Sampler`` that leaves each process its share of the prompts; all get all groups."""

    def __init__(self, sampler: Sampler, processes: Processes):
        self.sampler = sampler
        self.processes = processes

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
        return self._shared(self.sampler.sample, prompt_ids, n, params, seed, rows, first)

    def sample_turns(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        turns: Turns,
        *,
        rows: Sequence[int] | None = None,
        first: int = 0,
    ) -> list[Group]:
        """See ``Sampler``: each process answers its own completions."""
        sample = functools.partial(self.sampler.sample_turns, turns=turns)
        return self._shared(sample, prompt_ids, n, params, seed, rows, first)

    def _shared(
        self,
        sample: Callable[..., list[Group]],
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        params: SamplingParams,
        seed: int,
        rows: Sequence[int] | None,
        first: int,
    ) -> list[Group]:
        rows = range(len(prompt_ids)) if rows is None else rows
        own = self.processes.share(len(prompt_ids))
        mine = slice(own.start, own.stop)

        def sample_own() -> list[Group]:
            if not own:
                return []
            return sample(
                prompt_ids[mine], n, params, seed, rows=rows[mine], first=first + own.start
            )

        return [group for part in self.processes.run_everywhere(sample_own) for group in part]

    def weights_changed(self) -> None:
        self.sampler.weights_changed()

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        """See ``Sampler``; ``prompt_ids`` are this process's."""
        return self.sampler.warm_up(prompt_ids, n, params)
