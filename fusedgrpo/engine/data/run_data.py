"""The data sets of a run: what it trains on, and what it evaluates on."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.dataset import Example, PromptDataset, load_prompts
from fusedgrpo.engine.data.held_out import HeldOut, each_of, load_held_out
from fusedgrpo.engine.data.streams import training_rows
from fusedgrpo.engine.data.unsaid import rows_for
from fusedgrpo.errors import ConfigError
from fusedgrpo.tasks import is_task

log = logging.getLogger("fusedgrpo")


def all_examples(train: PromptDataset, held_out: HeldOut | None) -> list[Example]:
    """All that may be sampled."""
    return [example for part in (train, *each_of(held_out)) for example in part.examples]


def unseen(held_out: PromptDataset, trained: PromptDataset) -> PromptDataset | None:
    """``held_out`` without the prompts that are trained on, which a task of few different questions
    makes again, and each other one once, for a second answer to it says little that is new; None if
    there are no others."""
    known = {repr(example.prompt) for example in trained.examples}
    new = [example for example in held_out.examples if repr(example.prompt) not in known]
    left = list({repr(example.prompt): example for example in reversed(new)}.values())[::-1]
    if len(left) < len(held_out):
        log.warning(
            "%s: of %d held-out questions %d are left out: %d are trained on, too, and %d come "
            "again.",
            *(held_out.source, len(held_out), len(held_out) - len(left)),
            *(len(held_out) - len(new), len(new) - len(left)),
        )
    return dataclasses.replace(held_out, examples=left) if left else None


def load_data(
    args: GRPOConfig,
    processing_class: Any,
    train: Any,
    held_out: Any,
    reading: dict[str, Any],
    world_size: int,
) -> tuple[PromptDataset, HeldOut | None]:
    """The prompts of training and of evaluation: of what was passed, else of ``args``, else those
    of the run's environment.

    reading: more arguments of ``load_prompts``. Raises ConfigError and DataError.
    """
    source = training_rows(args.dataset if train is None else train, args, world_size)
    if source is None:
        source = rows_for(reading.get("tools"), args, world_size)
    if source is None:
        raise ConfigError(
            "`train_dataset` is required: dataset is missing. Pass train_dataset, or give dataset "
            "a file, a directory or a name in dataset_dir."
        )
    prompts = load_prompts(source, args, processing_class, **reading)
    held_out = args.eval_dataset if held_out is None else held_out
    evaluation: HeldOut | None = None
    if held_out is not None:
        evaluation = load_held_out(
            held_out,
            args.max_samples,
            lambda one: load_prompts(one, args, processing_class, split="test", **reading),
        )
    elif args.val_size:
        prompts, evaluation = prompts.split(args.val_size, args.seed)
    elif is_task(source):
        held_out = load_prompts(source, args, processing_class, split="test", **reading)
        evaluation = unseen(held_out, prompts)
    if args.eval_strategy != "no" and evaluation is None:
        raise ConfigError(
            f"eval_strategy: {args.eval_strategy} needs an eval_dataset or a val_size."
        )
    return prompts, evaluation
