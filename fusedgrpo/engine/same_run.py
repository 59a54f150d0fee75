"""Whether a checkpoint is of the run that is to go on from it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusedgrpo.config.redaction import redacted
from fusedgrpo.config.schema import GRPOConfig, free_to_change
from fusedgrpo.engine.batch_plan import BatchPlan, resolve_batch
from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.errors import CheckpointError, brief

log = logging.getLogger("fusedgrpo")

# What the precision follows from, together with the machine.
PRECISION = {"bf16", "fp16", "dtype"}

# How long a run is. It has no part in what a step does, save through the schedule.
LENGTH = {"max_steps", "num_train_epochs"}

# Before the hash of the rows; without it, the hash is that of version 0.1.
_DATA_TAG = "rows:"


@dataclass(frozen=True)
class RunIdentity:
    """Everything that a result depends on, beside weights and counters. processes: their number."""

    config: GRPOConfig
    precision: str
    data: PromptDataset
    plan: BatchPlan
    processes: int

    def to_record(self) -> dict[str, Any]:
        """Plain values, for ``state.json``."""
        return {
            "config": self.config.to_record(),
            "precision": self.precision,
            "data": _DATA_TAG + self.data.fingerprint,
            "prompt_ids": self.data.ids_fingerprint,
            "groups": self._groups,
        }

    @property
    def _groups(self) -> list[int]:
        """Groups in a step and in a rollout, which may depend on the number of processes."""
        return [self.plan.groups_per_step, self.plan.groups_per_rollout]

    def _had_ended(self, state: Mapping[str, Any]) -> bool:
        """Whether the run had done all its steps: it can be extended."""
        then = {name: state["config"].get(name, getattr(self.config, name)) for name in LENGTH}
        plan = resolve_batch(replace(self.config, **then), len(self.data), self.processes)
        return bool(state["progress"]["step"] >= plan.total_steps)

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError where ``state``, the record in ``path``, is of another run."""
        allowed = set(self.config.allow_change)
        step, total = state["progress"]["step"], self.plan.total_steps
        if self._had_ended(state):
            allowed |= LENGTH
            if step < total:
                log.warning(
                    "The run of %d steps that %s was saved from had ended; it is extended to %d "
                    "steps, and its learning rate goes on as in a run of that length.",
                    *(step, path, total),
                )
        # An option that the checkpoint's version did not have was what it is by default.
        # A secret may be another one now: it is not stored, and no result is to depend on it.
        now = json.loads(json.dumps(self.config.to_record()))
        then = redacted(GRPOConfig().to_dict() | state["config"])
        changed = [
            f"{name}: {brief(then[name])} -> {brief(value)}"
            for name, value in now.items()
            if name not in free_to_change() | allowed and then[name] != value
        ]
        precision = self.precision
        if not allowed & PRECISION and state.get("precision", precision) != precision:
            changed.append(
                f"the precision: {state['precision']} -> {precision}, which is what this machine "
                "computes in unless told otherwise (bf16 in allow_change lets it, or with "
                "bf16: false goes on in float32)"
            )
        if "dataset" not in allowed and (problem := _other_data(self.data, state)):
            changed.append(f"dataset: {problem}")
        if not changed and not self.config.allow_change and state["groups"] != self._groups:
            changed.append(
                f"prompts per step and per rollout: {state['groups']} -> {self._groups}, by "
                f"the number of processes ({self.processes}); prompts_per_step and "
                "generation_batch_size do not depend on it"
            )
        if changed:
            raise CheckpointError(
                f"This is not the run that {path} was saved from. Changed since: "
                f"{'; '.join(changed)}. Set them back, or name in allow_change those that are "
                "meant to differ."
            )


def _other_data(data: PromptDataset, state: Mapping[str, Any]) -> str | None:
    """How the data differs from what the checkpoint was trained on."""
    tagged = str(state["data"]).startswith(_DATA_TAG)
    own = _DATA_TAG + data.fingerprint if tagged else data.fingerprint_of_format_1
    if state["data"] != own:
        return "the training prompts are not the same"
    if state.get("prompt_ids", data.ids_fingerprint) != data.ids_fingerprint:
        return (
            "the rows are the same, but are encoded to other tokens: the tokenizer or its chat "
            "template has changed"
        )
    return None
