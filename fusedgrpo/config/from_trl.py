"""``trl.GRPOConfig``, and transformers' ``TrainingArguments``, as options of ours."""

from __future__ import annotations

import dataclasses
from typing import Any

# Made by TRL out of others, where they were not given: completions per sampling.
_DERIVED = ("generation_batch_size", "steps_per_generation")


def is_foreign(args: Any) -> bool:
    """Whether ``args`` are the arguments of a trainer of transformers or TRL."""
    return not isinstance(args, type) and any(
        kind.__name__ == "TrainingArguments" and kind.__module__.startswith("transformers.")
        for kind in type(args).__mro__
    )


def given_options(args: Any) -> dict[str, Any]:
    """The options that were given to ``args``, by their names there: those that are not as their
    class makes them.

    An option that was given its default cannot be told from one that was left out; fields of a
    class that a user derived are the user's own.
    """
    theirs = {
        name
        for kind in type(args).__mro__
        if _is_theirs(kind)
        for name in vars(kind).get("__dataclass_fields__", {})
    }
    specs = [spec for spec in dataclasses.fields(args) if spec.name in theirs and spec.init]
    # With the device and the precision that were chosen, whatever follows from them is the same.
    chosen = {name: getattr(args, name) for name in ("use_cpu", "fp16", "output_dir")}
    bare = _first_of_theirs(type(args))(**chosen)
    given = {}
    for spec in specs:
        value = getattr(args, spec.name)
        same = [_default(spec)] + ([] if spec.name in chosen else [getattr(bare, spec.name)])
        if spec.name not in _DERIVED and not any(_equal(value, s) for s in same):
            given[spec.name] = value
    steps = getattr(args, "steps_per_generation", None)
    if steps not in (None, args.gradient_accumulation_steps):
        given["steps_per_generation"] = steps
    # transformers sets it wherever there is an eval_strategy, and its trainer does not read it.
    given.pop("do_eval", None)
    # What transformers puts there for load_best_model_at_end; GRPO's loss does not say how good a
    # policy is.
    if given.get("metric_for_best_model") == "loss":
        given.pop("metric_for_best_model")
        given.pop("greater_is_better", None)
    elif given.get("greater_is_better") is True:
        given.pop("greater_is_better")  # the default
    return given


def _default(spec: dataclasses.Field[Any]) -> Any:
    """The default of a field; None where there is none."""
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return None if spec.default is dataclasses.MISSING else spec.default


def _first_of_theirs(kind: type) -> Any:
    """The class itself or the one that a user derived it from."""
    return next(k for k in kind.__mro__ if _is_theirs(k))


def _is_theirs(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("transformers", "trl")


def _equal(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)
