"""The sampler of a run, and what it samples from: as the run began, on whatever machine it goes on.

What ``rollout_weights: auto`` becomes follows from the memory of the machine, and the two kinds of
weights round in different ways. So it is part of a run's state.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.plan import MemoryPlan, RolloutWeights
from fusedgrpo.engine.memory.rollout_weights import choose_rollout_weights
from fusedgrpo.engine.rollout.choice import ChosenSampler
from fusedgrpo.engine.rollout.sampler import Sampler
from fusedgrpo.engine.rollout.shared_sampler import SharedSampler
from fusedgrpo.errors import ModelError
from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")


class RunSampler:
    """Makes the sampler of a run.

    memory_plan: of the run as it is now. plan_for: the plan of another configuration. Arguments as
    ``ChosenSampler.make`` takes them.

    weights: what completions come from; None where that is not ours to say.
    """

    def __init__(
        self,
        args: GRPOConfig,
        policy: Policy,
        tokenizer: Any,
        eos_ids: Sequence[int],
        execution: Execution,
        chosen: ChosenSampler,
        memory_plan: MemoryPlan | None,
        plan_for: Callable[[GRPOConfig], MemoryPlan | None],
    ):
        self.args = args
        self.policy = policy
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.execution = execution
        self.chosen = chosen
        self.memory_plan = memory_plan
        self.plan_for = plan_for
        self.weights: RolloutWeights | None = None
        if chosen.decodes:
            fits = execution.processes.gather(choose_rollout_weights(args, memory_plan, policy))
            self.weights = "merged" if set(fits) == {"merged"} else "adapter"

    def make(self) -> Sampler:
        """The sampler, for all processes together. Raises what ``ChosenSampler.make`` does."""
        try:
            return self._made()
        except ModelError:
            if self.weights != "merged" or self.args.rollout_weights != "auto":
                raise
        # Nobody has asked for a copy, and without one there may be another sampler.
        self.weights = "adapter"
        return self._made()

    def make_of_base(self) -> Sampler:
        """Another sampler, made and used while the policy's adapters are switched off: that of
        the model without them."""
        return self._made("adapter")

    def _made(self, weights: RolloutWeights | None = None) -> Sampler:
        options: dict[str, Any] = {"skip_special_tokens": self.args.skip_special_tokens}
        if self.weights is not None:
            options["rollout_weights"] = weights or self.weights
        made = self.chosen.make(
            self.policy, self.tokenizer, self.eos_ids, execution=self.execution, **options
        )
        processes = self.execution.processes
        return SharedSampler(made, processes) if processes.size > 1 else made

    def go_on_with(self, began: RolloutWeights | None) -> Sampler | None:
        """The sampler of a run that ``began`` with these weights, planned anew; None where it is
        the one that is there. Checkpoints of versions that had no choice have None."""
        option = "rollout_weights"
        free = self.args.rollout_weights == "auto" and option not in self.args.allow_change
        if not free or began is None or self.weights in (None, began):
            return None
        log.warning(
            "%s: %s, with which the run began; on its own, this machine would have chosen %s.",
            option,
            began,
            self.weights,
        )
        self.weights = began
        self.memory_plan = self.plan_for(dataclasses.replace(self.args, rollout_weights=began))
        return self._made()
