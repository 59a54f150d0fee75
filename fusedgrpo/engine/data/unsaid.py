"""Prompts that no row has: where a run has environments, they may say the whole prompt (TRL's
convention)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.engine.data.formats import Layout, Messages, Prompt
from fusedgrpo.engine.data.formats.layout import Names
from fusedgrpo.engine.data.row_tools import Tools
from fusedgrpo.errors import ConfigError, DataError

# Rows are made for a run without data, as many as it asks prompts: what is said of a prompt is said
# of one episode then. No more than these, so that a run of any length begins at once.
MOST_ROWS = 1000


def _empty() -> Messages:
    """The message that an environment adds its words to."""
    return [{"role": "user", "content": ""}]


@dataclass(frozen=True, slots=True)
class UnsaidLayout(Layout):
    """Rows without a prompt, which ``reset`` of their environment returns."""

    @property
    def required(self) -> str:
        return ""

    def read(self, row: Mapping[str, Any]) -> Prompt:
        return Prompt(_empty(), _empty(), is_in_row=False)

    def mapped(self, columns: Names, tags: Names) -> Layout:
        raise DataError("An environment that says the prompt has no columns to map.")


UNSAID = UnsaidLayout()


def rows_for(tools: Tools | None, args: GRPOConfig, world_size: int) -> list[dict[str, Any]] | None:
    """The rows of a run without data, whose environment says all of its prompts; None for a run
    without environments. Raises ConfigError where they cannot be made."""
    if tools is None or not tools.environments:
        return None
    if tools.environments != (None,):
        raise ConfigError(
            "environment_factory: a dict of environments requires a `train_dataset` (or dataset), "
            "with a column 'environment' that names one of "
            f"{', '.join(map(repr, tools.environments))} in each row."
        )
    if args.max_steps <= 0:
        raise ConfigError(
            "max_steps: without a train_dataset, whose prompts the environment says, it has to say "
            "how long the run is."
        )
    count = min(resolve_batch(args, 1, world_size).prompts, MOST_ROWS)
    return [{"prompt": _empty()} for _ in range(count)]
