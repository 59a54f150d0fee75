"""From options as they are given, in any known spelling, to values under our own names; and from
values to plain types again."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping
from types import NoneType
from typing import Any

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.config.from_pretrained import settle
from fusedgrpo.config.generation import settle_generation
from fusedgrpo.config.loaders import LoaderSettings, read_loader_settings
from fusedgrpo.config.not_here import why_not
from fusedgrpo.config.redaction import marks
from fusedgrpo.config.structured import read_structured
from fusedgrpo.config.values import check_text, read_value
from fusedgrpo.errors import ConfigError, brief, did_you_mean

log = logging.getLogger("fusedgrpo")

# The option (or unknown key) that is wrong, and the line to print.
Problem = tuple[str, str]

# Everywhere else an empty text is a mistake, often a variable of a shell that is not set; as a
# path it would mean the working directory.
_MAY_BE_EMPTY = ("system_prompt",)


def resolve(
    given: Mapping[Any, Any], hints: Mapping[str, Any], limits: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Any], list[Problem]]:
    """Our names and read values of what was ``given``, and what is wrong with the rest.

    hints, limits: type and range of each option.
    """
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    problems: list[Problem] = []
    asked = [(label_of(key), key, value) for key, value in given.items()]
    for of, sort in (("model_init_kwargs", settle), ("generation_kwargs", settle_generation)):
        more = _mapping(given.get(of))
        if more is None:
            continue
        settled = sort(more)
        asked += settled.options
        problems += [(of, f"{name}: {text}") for name, text in settled.problems]
        asked = [
            (label, key, (settled.arguments or None) if key == of else value)
            for label, key, value in asked
        ]
    for label, key, value in asked:
        name = ALIASES[key].option if key in ALIASES else label_of(key)
        try:
            if key in REFUSED:
                if REFUSED[key].accepts(value):
                    if REFUSED[key].inert and value is not None:
                        _say(f"{label} changes nothing: {REFUSED[key].remedy}.")
                    continue
                raise ValueError(f"not supported: {REFUSED[key].remedy}.")
            if name not in hints:
                raise ValueError(f"unknown option.{did_you_mean(name, [*hints, *ALIASES])}")
            convert = ALIASES[key].convert if key in ALIASES else None
            value = _tidy(name, convert(value) if convert else value)
            if isinstance(value, str) and not value.strip() and name not in _MAY_BE_EMPTY:
                raise ValueError(
                    f"expected text, got {value!r}. Leave the option out for its default."
                )
            value = read_value(value, hints[name], limits[name])
            if name == "accelerator_config" and value is not None:
                value = LoaderSettings(value)
        except ValueError as error:
            problems.append((name, f"{label}: {why_not(name, value) or error}"))
            continue
        if name in values and values[name] != value:
            both = f"given as {brief(values[name])} and {brief(value)}"
            problems.append((name, f"{spelled[name]} and {label} are one option, {both}."))
        values[name] = value
        spelled[name] = label
    return values, problems


def _mapping(value: Any) -> Mapping[str, Any] | None:
    """A mapping, or one that is written as JSON, as on a command line."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None  # said where the option is read
    return value if isinstance(value, Mapping) and all(isinstance(k, str) for k in value) else None


@functools.cache
def _say(text: str) -> None:
    """Warn, once in a process."""
    log.warning(text)


def left_out(values: Mapping[str, Any]) -> list[Problem]:
    """The secrets that are missing in options which come from the record of another run."""
    found = [(name, path) for name, value in values.items() for path in marks(value, name)]
    return [
        (name, f"{path}: was a secret and left out where this was written; give it anew.")
        for name, path in found
    ]


def label_of(key: Any) -> str:
    """The name of an option, or whatever was given as one, for a message."""
    return key if isinstance(key, str) and len(key) <= 100 else brief(key)


def _tidy(name: str, value: Any) -> Any:
    """Bring the accepted spellings of a few options to one form. The type check comes after."""
    if name == "reward_funcs":
        return _reward_funcs(value)
    if name == "dtype" and type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    if name == "accelerator_config":
        return read_loader_settings(value)
    if name == "structured_outputs":
        return read_structured(value)
    if name in ("logging_steps", "save_steps", "eval_steps") and isinstance(value, float):
        return int(value) if value.is_integer() else value  # parsers of a command line: 10.0
    if not isinstance(value, (str, bool, list, tuple, NoneType)):  # == may be anything: an array's
        return value
    if name == "stop_strings" and isinstance(value, str):
        return [value]  # with its commas and spaces
    if name in ("lora_target_modules", "report_to") and isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    if name == "lora_target_modules":
        if value is None:  # TRL's default
            return "all-linear"
        if value == []:
            raise ValueError("expected module names or all-linear, got none.")
        return "all-linear" if value in (["all"], ["all-linear"]) else value
    if name == "report_to":
        return "none" if value in (None, [], ["none"]) else value
    if name == "scale_rewards" and value in (True, "true"):
        return "group"
    if name == "scale_rewards" and value == "false":
        return "none"
    if name == "resume_from_checkpoint" and value in ("true", "false"):
        return value == "true"
    return value


def _reward_funcs(value: Any) -> list[Any] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    funcs = list(value) if isinstance(value, (list, tuple)) else [value]
    for func in funcs:
        if isinstance(func, str):
            check_text(func)
        elif not callable(func):
            kind = type(func).__name__
            raise ValueError(f"expected names or callables, got {brief(func)} ({kind}).")
    if not funcs:
        raise ValueError("expected at least one reward function, got none.")
    return funcs


def raise_all(problems: list[Problem]) -> None:
    """ConfigError with every problem, if there is one."""
    if problems:
        raise ConfigError(text for _, text in problems)


def plain(value: Any) -> Any:
    """``value`` as JSON and YAML have it; callables by their import path."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        scalar = (str, int, float, bool, NoneType)
        return {k if isinstance(k, scalar) else str(k): plain(item) for k, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if callable(value):
        value = value if hasattr(value, "__qualname__") else type(value)
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)
