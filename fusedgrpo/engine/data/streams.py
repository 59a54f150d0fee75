"""Data sets that are read as a stream: as many rows of them as a run needs."""

from __future__ import annotations

import itertools
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.errors import ConfigError, DataError, reason

# An evaluation samples all of its prompts, each time: more than this is a stream without an end.
MOST_HELD_OUT = 10_000


def is_stream(source: Any) -> bool:
    """Whether ``source`` is iterated and has no length, as an ``IterableDataset``."""
    return hasattr(source, "__iter__") and not hasattr(source, "__len__")


def training_rows(source: Any, args: GRPOConfig, world_size: int = 1) -> Any:
    """``source``, or where it is a stream its first rows, in a list: ``max_samples`` of them, else
    as many as ``max_steps`` take. They are shuffled like those of any data set.

    Raises ConfigError where neither is given, and DataError.
    """
    if not is_stream(source):
        return source
    counts = [] if args.max_samples is None else [args.max_samples]
    if args.max_steps > 0:
        counts.append(resolve_batch(args, 1, world_size).prompts)
    if not counts:
        raise ConfigError(
            "train_dataset: a stream does not say how long it is. Give max_steps, which says how "
            "many prompts the run takes, or max_samples."
        )
    return _first(source, min(counts), "train_dataset")


def held_out_rows(source: Any, max_samples: int | None) -> Any:
    """``source``, or where it is a stream all of its rows, at most ``max_samples``. Raises
    DataError for one that goes on and on."""
    if not is_stream(source):
        return source
    rows = _first(source, MOST_HELD_OUT + 1 if max_samples is None else max_samples, "eval_dataset")
    if max_samples is None and len(rows) > MOST_HELD_OUT:
        raise DataError(
            f"eval_dataset: a stream of more than {MOST_HELD_OUT} rows, all of which would be "
            "sampled in each evaluation. Give max_samples, or .take(number) of the stream."
        )
    return rows


def _first(source: Any, count: int, name: str) -> list[Any]:
    try:
        return list(itertools.islice(source, count))
    except Exception as error:  # a generator of somebody's own, or a connection
        raise DataError(f"{name}: the stream cannot be read: {reason(error)}.") from error
