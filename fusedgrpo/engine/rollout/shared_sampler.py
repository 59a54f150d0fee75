"""A rollout that several processes share."""

from __future__ import annotations

from collections.abc import Sequence

from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
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
        rows = range(len(prompt_ids)) if rows is None else rows
        own = self.processes.share(len(prompt_ids))
        mine = slice(own.start, own.stop)

        def sample() -> list[Group]:
            if not own:
                return []
            return self.sampler.sample(
                prompt_ids[mine], n, params, seed, rows=rows[mine], first=first + own.start
            )

        return [group for part in self.processes.run_everywhere(sample) for group in part]

    def weights_changed(self) -> None:
        self.sampler.weights_changed()

    def warm_up(self, prompt_ids: Sequence[Sequence[int]], n: int, params: SamplingParams) -> bool:
        """See ``Sampler``; ``prompt_ids`` are this process's."""
        return self.sampler.warm_up(prompt_ids, n, params)
