"""Where the prompt is in a row of a data set: the formats by their names.

A format is a ``Layout`` in a file of its own and a line in ``LAYOUTS``; then ``dataset_format``
and ``formatting`` in LLaMA-Factory's ``dataset_info.json`` may name it.
"""

from __future__ import annotations

from collections.abc import Collection

from fusedgrpo.engine.data.formats.alpaca import AlpacaLayout
from fusedgrpo.engine.data.formats.conversation import OPENAI, SHAREGPT, ConversationLayout
from fusedgrpo.engine.data.formats.layout import Layout, Messages, Prompt
from fusedgrpo.engine.data.formats.prompt import PromptLayout
from fusedgrpo.errors import DataError, did_you_mean

__all__ = [
    "LAYOUTS",
    "AlpacaLayout",
    "ConversationLayout",
    "Layout",
    "Messages",
    "Prompt",
    "PromptLayout",
    "guess_layout",
    "has_layout",
    "missing_column",
]

# The names are those of `dataset_format` in `config/rules.py`. Where none is given, the first
# format whose column is there is taken.
LAYOUTS: dict[str, Layout] = {
    "prompt": PromptLayout(),
    "alpaca": AlpacaLayout(),
    "sharegpt": SHAREGPT,
    "openai": OPENAI,
}


def guess_layout(columns: list[str], source: str) -> Layout:
    """The layout that the column names tell. DataError shows the columns if none fits."""
    for layout in LAYOUTS.values():
        if layout.required in columns:
            return layout
    (first, *_), *others = ((layout.required, name) for name, layout in LAYOUTS.items())
    or_else = ", ".join(f"`{column}` in {name} data" for column, name in others)
    raise missing_column(first, columns, source, f" (or {or_else})")


def has_layout(columns: Collection[str]) -> bool:
    """Whether the column names tell a layout."""
    return any(layout.required in columns for layout in LAYOUTS.values())


def missing_column(column: str, columns: list[str], source: str, or_else: str = "") -> DataError:
    """The error for a prompt column that is not there."""
    return DataError(
        f"{source}: no column {column!r}{or_else}; the columns are "
        f"{', '.join(map(repr, columns)) or 'none'}.{did_you_mean(column, columns)} Rename one, "
        "map it under `columns` in dataset_info.json, or give dataset_format a function that "
        "makes rows with a prompt."
    )
