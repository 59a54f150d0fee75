"""``Callback``: code that is told what happens in a run. Display, trackers and advice are such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgrpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Callback:
    """Override what you need; pass instances as ``GRPOTrainer(callbacks=[...])``.

    Called in process 0 between pieces of work, in the order given, after the step's rows are in
    metrics.jsonl; a rollout that came with a checkpoint is not told again. Nothing that a callback
    does to its arguments changes the run. An error in one ends the run, in all its processes, like
    one in a reward function: its last step is saved first. At ``on_end`` all is written already.
    """

    def on_rollout(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """A rollout was sampled and scored, and ``step`` is the first to train on it. records: one
        for each completion, as in ``completions/``."""

    def on_evaluate(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The held-out prompts were sampled and scored after ``step``; names begin with
        ``eval_``."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """An optimizer step is done. row: as in ``metrics.jsonl``, evaluation included."""

    def on_end(self, directory: Path) -> None:
        """The run has reached its last step; weights and report are in ``directory``."""


def sorted_callbacks(given: Any) -> tuple[list[Callback], list[TrainerCallback]]:
    """Sort ``given`` into ours and transformers', which are made where a class was given. Raises
    ConfigError for what is neither, or both."""
    from transformers import TrainerCallback

    found = list(given) if isinstance(given, Iterable) else [given]
    ours: list[Callback] = []
    theirs: list[TrainerCallback] = []
    for callback in found:
        if callback is None:
            continue
        kind = callback if isinstance(callback, type) else type(callback)
        label = f"{kind.__module__}.{kind.__qualname__}"
        if issubclass(kind, Callback) and issubclass(kind, TrainerCallback):
            raise ConfigError(
                f"callbacks: {label} is a fusedgrpo.Callback and a transformers.TrainerCallback; "
                "their on_evaluate have other arguments. Make two of it."
            )
        if issubclass(kind, TrainerCallback):
            theirs.append(callback() if isinstance(callback, type) else callback)
        elif isinstance(callback, Callback):
            ours.append(callback)
        else:
            raise ConfigError(
                "callbacks: expected instances of fusedgrpo.Callback (on_rollout, on_step, "
                f"on_evaluate, on_end) or of transformers.TrainerCallback, got {label}."
            )
    return ours, theirs
