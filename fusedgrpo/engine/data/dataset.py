"""The prompts of a run: read, encoded and checked before the first step, none dropped silently."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fusedgrpo import stages
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.columns import ANSWER, CONVENTION, NOT_COLUMNS
from fusedgrpo.engine.data.encoded import EncodedRows
from fusedgrpo.engine.data.encoder import PromptEncoder
from fusedgrpo.engine.data.fingerprint import joined, row_digest
from fusedgrpo.engine.data.formats import (
    Layout,
    Messages,
    Prompt,
    PromptLayout,
    guess_layout,
    has_layout,
    missing_column,
)
from fusedgrpo.engine.data.formats.chosen import Formats
from fusedgrpo.engine.data.media import media_reason
from fusedgrpo.engine.data.row_tools import RowTools, Tools
from fusedgrpo.engine.data.rows import BadRowError, Row
from fusedgrpo.engine.data.sources import read_source, read_tasks
from fusedgrpo.engine.data.unsaid import UNSAID
from fusedgrpo.engine.run_clock import RunClock
from fusedgrpo.errors import DataError
from fusedgrpo.input_files import exists
from fusedgrpo.tasks import is_task

logger = logging.getLogger("fusedgrpo")

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt.

    row: index in the source. prompt: text or messages, as the reward functions get it.
    prompt_ids: what the model gets. columns: the row's other columns, as in the source or as the
    function made them that is its format. read: the prompt before it was encoded. digest: sha256
    of the row, likewise.
    """

    row: int
    prompt: str | Messages
    prompt_ids: tuple[int, ...]
    columns: dict[str, Any]
    read: Prompt | None = None
    digest: bytes = b""


@dataclass
class PromptDataset:
    """Prompts, ready to sample from.

    Every example has all of ``column_names`` (None where its row lacks one). conversational:
    prompts are messages, and so will completions be. skipped: ``{"row", "where", "reason"}`` of
    each row left out. encoder: what encoded the prompts.
    """

    examples: list[Example]
    column_names: list[str]
    conversational: bool
    source: str
    skipped: list[dict[str, Any]] = field(default_factory=list)
    encoder: PromptEncoder | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the rows that are used, as their format makes them: equal for equal
        training data."""
        return joined(example.digest for example in self.examples)

    @property
    def ids_fingerprint(self) -> str:
        """sha256 over the token ids of the prompts."""
        return joined(row_digest({"ids": example.prompt_ids}) for example in self.examples)

    @property
    def fingerprint_of_format_1(self) -> str:
        """That of checkpoints of version 0.1: sha256 over token ids and columns together."""
        digest = hashlib.sha256()
        for example in self.examples:
            line = json.dumps([example.prompt_ids, example.columns], sort_keys=True, default=str)
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()

    def encoded_again(self) -> PromptDataset:
        """The same prompts as the encoder renders them now: by another date, if its template says
        one. Raises DataError for one that cannot be used any more."""
        if self.encoder is None or not self.encoder.is_dated:
            return self
        examples = []
        for example in self.examples:
            assert example.read is not None
            try:
                ids = self.encoder.encode(example.read)
            except (BadRowError, DataError) as error:
                raise DataError(f"{self.source} row {example.row}: {error}") from error
            examples.append(replace(example, prompt_ids=ids))
        return replace(self, examples=examples)

    def split(self, val_size: float, seed: int) -> tuple[PromptDataset, PromptDataset]:
        """Training and held-out part: a share of the examples if ``val_size`` < 1, else a count."""
        total = len(self.examples)
        count = int(val_size) if val_size >= 1 else max(1, round(val_size * total))
        if count >= total:
            raise DataError(f"val_size {val_size:g} leaves none of {total} prompts for training.")
        held_out = set(random.Random(seed).sample(range(total), count))
        train = [e for i, e in enumerate(self.examples) if i not in held_out]
        held = [e for i, e in enumerate(self.examples) if i in held_out]
        return replace(self, examples=train), replace(self, examples=held, skipped=[])


def load_prompts(
    source: Any,
    config: GRPOConfig,
    tokenizer: Any,
    *,
    vocab_size: int | None,
    context_length: int | None,
    split: str = "train",
    clock: RunClock | None = None,
    formats: Formats | None = None,
    said: set[str] | None = None,
    tools: Tools | None = None,
) -> PromptDataset:
    """Read, encode and check all prompts of ``source``.

    source: a name or path (several, comma-separated), a ``datasets.Dataset`` or a list of dicts.
    vocab_size, context_length: the model's, where known. clock: says the date to chat
    templates; the system's if there is none. formats: the run's, with its search paths; without,
    that of ``dataset_format``. said, tools: see ``PromptEncoder``.
    Raises DataError for a source, column or row that cannot be used.
    """
    encoder = PromptEncoder(
        config,
        tokenizer,
        vocab_size=vocab_size,
        context_length=context_length,
        clock=clock,
        said=said,
        tools=tools,
    )
    messages = bool(getattr(tokenizer, "chat_template", None))
    formats = formats or Formats(config.dataset_format)
    acts = tools is not None and bool(tools.environments)
    name, rows = _read_all(source, config, split, formats, messages, acts=acts)
    with stages.stage(f"reading the prompts of {name}", counted=True):
        found = [
            _read(row, layout, encoder.row_tools) for row, layout in stages.count(rows, "rows")
        ]
    digests = [None if isinstance(each, BadRowError) else each[1] for each in found]
    layouts = [layout for _, layout in rows]
    known = EncodedRows.of(encoder, list(zip(digests, layouts, strict=True)))
    with stages.stage(f"encoding {name}", counted=True):
        examples, skipped, bad = _all_encoded(stages.count(rows, "rows"), found, encoder, known)
    known.save()
    if bad and config.on_bad_row == "error":
        raise DataError(
            f"{name}: {len(bad)} of {len(rows)} rows cannot be used:\n{_listing(bad)}\n"
            "Correct them, or set on_bad_row: skip."
        )
    if skipped:
        logger.warning(f"{name}: skipped {len(skipped)} of {len(rows)} rows:\n{_listing(skipped)}")
    if not examples:
        raise DataError(
            f"{name}: {len(rows)} rows, none of them a usable prompt:\n{_listing(skipped)}"
        )

    columns = list(dict.fromkeys(key for example in examples for key in example.columns))
    examples = [replace(e, columns={key: e.columns.get(key) for key in columns}) for e in examples]
    conversational = isinstance(examples[0].prompt, list)
    return PromptDataset(examples, columns, conversational, name, skipped, encoder)


def _read_all(
    source: Any, config: GRPOConfig, split: str, formats: Formats, messages: bool, *, acts: bool
) -> tuple[str, list[tuple[Row, Layout]]]:
    """The name of the source, or of all in a comma-separated list, and their rows in order.
    messages: questions of tasks are those of a user in a chat. acts: in environments, which may say
    the prompts of rows that have none."""
    several = isinstance(source, str) and "," in source and not exists(Path(source))
    names: list[str] = []
    rows: list[tuple[Row, Layout]] = []
    for one in source.split(",") if several else [source]:
        one = one.strip() if several else one
        if is_task(one):
            found = read_tasks(one, config, split, messages)
        else:
            found = read_source(one, config.dataset_dir, split, formats=formats)
        kept = found.rows[: config.max_samples]
        if not kept:
            raise DataError(f"{found.name}: no rows.")
        layout = found.layout or formats.given or _guessed(found.rows, found.name, acts)
        made = [layout.made(row) for row in kept]
        _check_columns(_columns(made), layout, found.name)
        names.append(found.name)
        rows += [(row, layout) for row in made]
    return ", ".join(names), rows


def _columns(rows: list[Row]) -> list[str]:
    """The columns that the rows have; none where no row could be read."""
    return list(dict.fromkeys(key for row in rows for key in row.values or ()))


def _guessed(rows: list[Row], name: str, acts: bool) -> Layout:
    columns = _columns(rows)
    if acts and columns and not has_layout(columns):
        logger.warning(
            f"{name}: no column 'prompt'. The environment's reset is to return the prompts; it is "
            f"given the columns {', '.join(map(repr, columns))}."
        )
        return UNSAID
    return guess_layout(columns, name) if columns else PromptLayout()


def _check_columns(columns: list[str], layout: Layout, source: str) -> None:
    if not columns:  # let the reasons of the rows be the message
        return
    if layout.required and layout.required not in columns:
        raise missing_column(layout.required, columns, source)
    for name in CONVENTION:
        if name in columns and name not in NOT_COLUMNS:
            raise DataError(
                f"{source}: reward functions get their own {name!r}; rename the column."
            )


def _read(row: Row, layout: Layout, tools: RowTools) -> tuple[Prompt, bytes] | BadRowError:
    """The prompt of a row and the row's digest, or the reason why there is none."""
    try:
        if row.values is None:
            raise BadRowError(row.reason)
        if why := media_reason(row.values):
            raise BadRowError(why)
        prompt = tools.given(layout.read(row.values), row.values)
        return prompt, row_digest(row.values)
    except BadRowError as error:
        return error
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    except Exception as error:  # noqa: BLE001 - values of any type may be in a row
        return _unreadable(error)


def _unreadable(error: Exception) -> BadRowError:
    return BadRowError(f"it cannot be read: {type(error).__name__}: {error}")


def _all_encoded(
    rows: Iterable[tuple[Row, Layout]],
    found: Sequence[tuple[Prompt, bytes] | BadRowError],
    encoder: PromptEncoder,
    known: EncodedRows,
) -> tuple[list[Example], list[dict[str, Any]], list[dict[str, Any]]]:
    """The examples; the rows that are left out, and those of them that are bad."""
    examples: list[Example] = []
    skipped: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    kind: type | None = None
    for index, ((row, _), read) in enumerate(zip(rows, found, strict=True)):
        try:
            if isinstance(read, BadRowError):
                raise read
            example = _encode(index, row, *read, encoder, known)
            kind = kind or type(example.prompt)
            if type(example.prompt) is not kind:
                raise BadRowError("it mixes text prompts and messages with the rows before it")
        except BadRowError as reason:
            skipped.append({"row": index, "where": row.where, "reason": str(reason)})
            bad += [] if row.left_out else skipped[-1:]
            continue
        examples.append(example)
    return examples, skipped, bad


def _encode(
    index: int, row: Row, prompt: Prompt, digest: bytes, encoder: PromptEncoder, known: EncodedRows
) -> Example:
    assert row.values is not None
    kept = known.kept(index)
    try:
        ids = encoder.encoded(prompt, kept)
        if kept is None:
            known.add(index, ids)
        ids = encoder.checked(ids, prompt)
    except BadRowError:
        raise
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    except Exception as error:  # values of any type may be in a row
        raise _unreadable(error) from error
    columns = {key: value for key, value in row.values.items() if key not in NOT_COLUMNS}
    if prompt.answer is not None:
        columns.setdefault(ANSWER, prompt.answer)
    return Example(index, prompt.given, ids, columns, prompt, digest)


def _listing(skipped: list[dict[str, Any]]) -> str:
    """The first rows that are not used and why; one line for all that share a reason."""
    by_reason: dict[str, list[str]] = {}
    for bad in skipped:
        by_reason.setdefault(bad["reason"], []).append(bad["where"])
    lines = []
    for reason, where in list(by_reason.items())[:_SHOWN]:
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        lines.append(f"  {where[0]}{more}: {reason}")
    if len(by_reason) > _SHOWN:
        rest = sum(len(where) for where in list(by_reason.values())[_SHOWN:])
        lines.append(f"  ... and {rest} more")
    return "\n".join(lines)
