"""The learning rate where none is given: another for an adapter than for all weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

# Adam moves each weight by about the learning rate per step, whatever the size of the gradient. An
# adapter starts from zero and has few weights: docs/decisions/0015-learning-rate.md.
LEARNING_RATES = {"lora": 3e-5, "full": 1e-6}


def learning_rate(config: GRPOConfig) -> float:
    """The peak of the schedule: as it was given, else by what is trained."""
    given = config.learning_rate
    return LEARNING_RATES[config.finetuning_type] if given is None else given


def settle(config: GRPOConfig, *, quietly: bool) -> None:
    """Write the learning rate that the run will have into ``config``. quietly: nothing is to be
    said of it, because an optimizer was given, which has its own."""
    object.__setattr__(config, "_chosen", config.learning_rate is None and not quietly)
    config.learning_rate = learning_rate(config)


def said(config: GRPOConfig) -> str:
    """Part of the run's line: the learning rate, if it was chosen here and is not TRL's."""
    if not getattr(config, "_chosen", False) or config.finetuning_type == "full":
        return ""
    return (
        f"; learning_rate {learning_rate(config):g}, the default for adapters "
        f"(TRL's {LEARNING_RATES['full']:g} is one for all weights)"
    )
