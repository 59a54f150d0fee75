"""The prompts of evaluations: one data set, or several with names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from fusedgrpo.engine.data.dataset import PromptDataset
from fusedgrpo.engine.data.streams import held_out_rows
from fusedgrpo.errors import DataError

HeldOut: TypeAlias = PromptDataset | dict[str, PromptDataset]


def load_held_out(
    source: Any, max_samples: int | None, load: Callable[[Any], PromptDataset]
) -> HeldOut:
    """``source`` as prompts, by ``load``. A dictionary is of data sets by name, as is, in TRL, a
    ``DatasetDict``; one with a split "test" stands for that split. Raises DataError."""
    if not isinstance(source, dict) or (type(source) is not dict and "test" in source):
        return load(held_out_rows(source, max_samples))
    if not source:
        raise DataError("eval_dataset: a dictionary of data sets, and none in it.")
    return {str(name): load(held_out_rows(one, max_samples)) for name, one in source.items()}


def each_of(held_out: HeldOut | None) -> list[PromptDataset]:
    """The data sets of an evaluation, in order."""
    if held_out is None:
        return []
    return [held_out] if isinstance(held_out, PromptDataset) else list(held_out.values())


def encoded_again(held_out: HeldOut | None) -> HeldOut | None:
    """The same prompts as templates render them now. Raises DataError."""
    if held_out is None or isinstance(held_out, PromptDataset):
        return held_out and held_out.encoded_again()
    return {name: prompts.encoded_again() for name, prompts in held_out.items()}
