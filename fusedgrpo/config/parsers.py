"""The options as command-line parsers of dataclasses find them: transformers' ``HfArgumentParser``
and TRL's ``TrlParser``.

A script for TRL parses its own options, TRL's ``ModelConfig`` and the trainer's configuration
together, and no two of these may have an option of the same name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import Field
from types import NoneType
from typing import Any, get_args, get_origin

from fusedgrpo.config.trl_fields import NAMES, TYPES, trl_fields
from fusedgrpo.config.values import same_option

# Options that a script has from ``trl.ModelConfig`` and ``trl.ScriptArguments``. As in
# ``trl.GRPOConfig``, a parser that is given the configuration does not have them.
ELSEWHERE = (
    "model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit",
    "bnb_4bit_quant_type", "use_bnb_nested_quant", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "use_rslora", "reward_funcs",
)  # fmt: skip


class ParsedFields:
    """In place of ``__dataclass_fields__``: the class, which is what parsers read, shows those in
    ``ELSEWHERE`` as none of its constructor's, and TRL's beside them; an instance, which
    ``dataclasses.replace`` reads, has the options and no others."""

    def __init__(self, fields: Mapping[str, Field[Any]]):
        own = {name: spec for name, spec in fields.items() if name not in NAMES}
        self._of_instance = {name: _with_init(spec, True) for name, spec in own.items()}
        self._of_class = trl_fields() | {
            name: _with_init(spec, False) if name in ELSEWHERE else spec
            for name, spec in own.items()
        }

    def __get__(self, instance: Any, owner: type) -> dict[str, Field[Any]]:
        return self._of_class if instance is None else self._of_instance

    @classmethod
    def of(cls, owner: type) -> None:
        """Have a dataclass show its options so; a derived one gets fields of its own."""
        fields = vars(owner).get("__dataclass_fields__")
        if isinstance(fields, dict):
            owner.__dataclass_fields__ = cls(fields)  # type: ignore[attr-defined]


def _with_init(spec: Field[Any], init: bool) -> Field[Any]:
    if spec.init is init:
        return spec
    other = copy.copy(spec)
    other.init = init
    same_option(spec, other)
    return other


def parsed_annotations(hints: Mapping[str, Any]) -> dict[str, Any]:
    """The annotations that argparse can carry out, where they are not those of ``hints``: a mapping
    is typed as JSON, a tuple of names with commas between them, a number as such."""
    found: dict[str, Any] = {}
    for name, hint in hints.items():
        origins = {get_origin(member) or member for member in (hint, *get_args(hint))}
        if dict in origins:
            found[name] = dict[str, Any] | str | None
        elif {int, float} <= origins:
            found[name] = float | None if NoneType in origins else float
        elif tuple in origins:
            found[name] = str | None
    return found | TYPES
