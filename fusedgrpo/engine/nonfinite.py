"""Updates whose loss, gradient or weights are not finite: how many are skipped, and until when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fusedgrpo.engine.checkpointing import Progress
from fusedgrpo.engine.learner import Learner, UpdateResult
from fusedgrpo.errors import NonFiniteError
from fusedgrpo.models.finite import not_finite

# Of float16: the loss scale starts too high and is halved with each of them.
SCALE_SEARCH = 20


def check_weights(learner: Learner, result: UpdateResult, step: int) -> None:
    """Raise NonFiniteError if the update ``result`` has left weights that are not finite."""
    if result.largest_weight is not None and not result.largest_weight.isfinite():
        raise NonFiniteError(
            f"Step {step}: {not_finite(learner.policy.trainable())}. Loss {result.loss} and "
            f"gradient norm {result.grad_norm} were those of the update; a lower learning_rate or "
            "a larger adam_epsilon is the usual remedy."
        )


def count(
    progress: Progress,
    learner: Learner,
    result: UpdateResult,
    dump: Callable[[], Path | None],
    tolerated: int,
) -> None:
    """Count the updates in a row that were not applied. Raises NonFiniteError for one more than
    ``tolerated``, whose batch ``dump`` writes; a skipped one is dumped too."""
    if result.applied:
        progress.nonfinite_in_a_row = 0
        return
    written = dump()
    if learner.scaler.is_enabled():
        tolerated = max(tolerated, SCALE_SEARCH)
    if progress.nonfinite_in_a_row >= tolerated:
        raise NonFiniteError(
            f"Step {progress.step + 1}: loss {result.loss} and gradient norm {result.grad_norm}. "
            f"The weights were not changed; the batch is in {written}. A lower learning_rate or "
            "max_grad_norm is the usual remedy; max_nonfinite_steps: N skips up to N such updates "
            "in a row."
        )
    progress.nonfinite_in_a_row += 1
