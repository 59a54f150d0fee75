"""How the samples of a step are cut into micro-batches, and the forward passes without gradients
that come before its update."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.models.micro_batches import longest, micro_batches, shares
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.router import RouterSums


class StepPasses:
    """execution: signals are looked for between micro-batches; each process forwards its share of
    the samples, and what does not fit into memory is cut smaller."""

    def __init__(self, policy: Policy, execution: Execution):
        self.policy = policy
        self.execution = execution

    def cut(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """The samples of each micro-batch, by their places."""
        pairs = [sample.pair for sample in samples]
        return micro_batches(
            pairs, self.execution.oom_retry.tokens, self.policy.layout, whole=self.policy.whole
        )

    def longest(self, samples: Sequence[TrainingSample]) -> int:
        return longest([sample.pair for sample in samples], whole=self.policy.whole)

    def packed(self, batch: Sequence[TrainingSample]) -> PackedBatch:
        # As in TRL, a completion that is out of the loss is out of the router's as well.
        return self.policy.pack([s.pair for s in batch], counted=[s.in_loss for s in batch])

    def entropies(self, samples: Sequence[TrainingSample]) -> list[Tensor]:
        """``[own_tokens]`` for each sample, on the CPU: of all, in every process."""
        processes = self.execution.processes
        own = shares([sample.pair for sample in samples], processes.size)[processes.rank]
        mine = samples[own.start : own.stop]
        work = functools.partial(self._entropies, mine)
        found = processes.run_everywhere(
            lambda: self.execution.oom_retry.update(
                work, lambda: self.longest(mine), "the entropies"
            )
        )
        return [entropy for of_process in found for entropy in of_process]

    def _entropies(self, samples: Sequence[TrainingSample]) -> list[Tensor]:
        cut = self.cut(samples)
        found: list[Tensor] = []
        with self.policy.passes():
            for members in cut:
                self.execution.check_interrupt()
                packed = self.packed([samples[i] for i in members])
                entropy = self.policy.logprobs(packed, entropy="detached").entropy
                assert entropy is not None
                found.append(entropy)
        entropies: dict[int, Tensor] = {}
        for members, entropy in zip(cut, found, strict=True):
            sizes = [samples[i].own_tokens for i in members]
            entropies |= zip(members, entropy.cpu().split(sizes), strict=True)
        return [entropies[i] for i in range(len(samples))]

    def router_load_of_all(self, own: Sequence[TrainingSample]) -> RouterSums:
        """The router's sums over the samples of all processes; ``own``: this one's."""
        assert self.policy.router is not None
        work = functools.partial(self.router_load, own)
        found = self.execution.processes.run_everywhere(
            lambda: self.execution.oom_retry.update(
                work, lambda: self.longest(own), "counting experts"
            )
        )
        return sum(found, self.policy.router.nothing("cpu"))

    def router_load(self, samples: Sequence[TrainingSample]) -> RouterSums:
        """The router's sums over the tokens of ``samples``, on the CPU."""
        assert self.policy.router is not None
        nothing = self.policy.router.nothing("cpu")
        routed: list[RouterSums] = []
        with self.policy.passes(), self.policy.autocast():
            for members in self.cut(samples):
                self.execution.check_interrupt()
                self.policy.hidden(self.packed([samples[i] for i in members]), routed=routed)
        return sum((sums.to("cpu") for sums in routed), nothing)
