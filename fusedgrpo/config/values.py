"""Read one option's value: the right type, inside its range, and nothing else.

Types come from the annotations of :class:`~fusedgrpo.config.schema.GRPOConfig`, ranges from the
bounds that :func:`option` is given. Text is turned into numbers and truth values, because YAML
1.1 reads ``1e-5`` as text and a command line has nothing but text; nothing else is converted.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from dataclasses import Field, field
from enum import Enum
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fusedgrpo.errors import brief, did_you_mean

# Kept beside the fields: transformers' HfArgumentParser passes all of their metadata to argparse.
_LIMITS: dict[Field[Any], dict[str, float]] = {}
_FREE: set[Field[Any]] = set()
_GROUPS: dict[Field[Any], str] = {}
_headings = ["other"]

# Limits of nested values. A few lines of YAML aliases expand to billions, and a value may hold
# itself; no reward or chat template needs so many.
MOST_VALUES, DEEPEST = 100_000, 50

_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")


def group(heading: str) -> None:
    """The options that follow belong under this heading in every list of them."""
    _headings.append(heading)


def group_of(spec: Field[Any]) -> str:
    """The heading that an option is under."""
    return _GROUPS[spec]


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    free: bool = False,
) -> Any:
    """A dataclass field with its help text and range (``low <= x``, ``above < x``, ...).

    free: a resumed run may have another value than its checkpoint, because the option only says
    where, how loud or how often, and does not change what is computed.
    """
    bounds = {">=": low, ">": above, "<=": high, "<": below}
    limits = {sign: bound for sign, bound in bounds.items() if bound is not None}
    made: Field[Any] = field(default=default, metadata={"help": help})
    _LIMITS[made] = limits
    _GROUPS[made] = _headings[-1]
    if free:
        _FREE.add(made)
    return made


def same_option(spec: Field[Any], copy: Field[Any]) -> None:
    """Give the copy of an option's field its range."""
    if spec in _LIMITS:
        _LIMITS[copy] = _LIMITS[spec]
    if spec in _FREE:
        _FREE.add(copy)


def limits_of(spec: Field[Any]) -> Mapping[str, float]:
    """The range of an option, as ``{sign: bound}``."""
    return _LIMITS[spec]


def is_free(spec: Field[Any]) -> bool:
    """Whether a resumed run may have another value of the option."""
    return spec in _FREE


def read_value(value: Any, hint: Any, limits: Mapping[str, float]) -> Any:
    """``value`` as ``hint`` inside ``limits``. ValueError says what was expected and given."""
    try:
        read = _convert(value, hint)
    except _WrongTypeError:
        raise ValueError(_expected(value, hint, limits)) from None
    numbers = [
        n for n in (read if isinstance(read, list) else [read]) if isinstance(n, (int, float))
    ]
    if not all(math.isfinite(n) and _inside(n, limits) for n in numbers):
        raise ValueError(_expected(value, hint, limits))
    return read


def takes_text(hint: Any) -> bool:
    """Whether a plain string is a value of ``hint`` (so that text must not be parsed)."""
    if hint is str or hint is Any or get_origin(hint) is Literal:
        return True
    return any(takes_text(member) for member in get_args(hint) if _is_union(hint))


def takes_truth(hint: Any) -> bool:
    """Whether true is a value of ``hint``."""
    return bool in members_of(hint)


class _WrongTypeError(Exception):
    """The value is not of the type, and cannot be read as one."""


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if hint is Any:
        return value
    if _is_union(hint):
        return _convert_union(value, get_args(hint))
    origin = get_origin(hint) or hint
    if origin is Literal:
        if value is False:  # YAML 1.1 reads a bare `no` or `off` as false
            value = next((word for word in ("no", "none") if word in get_args(hint)), value)
        if isinstance(value, str) and value in get_args(hint):
            return value
    elif origin in (list, tuple):
        item_hint = get_args(hint)[0]
        if isinstance(value, str):
            value = [item.strip() for item in value.split(",") if item.strip()]
        if isinstance(value, (list, tuple)):
            return origin(_convert(item, item_hint) for item in value)
    elif origin is dict:
        return _convert_dict(value)
    elif origin is bool:
        return _convert_bool(value)
    elif origin in (int, float):
        return _convert_number(value, origin)
    elif origin is str and isinstance(value, (str, os.PathLike)):
        value = os.fspath(value)
        if isinstance(value, str):
            return check_text(value)
    elif origin is NoneType and value is None:
        return None
    raise _WrongTypeError


def _convert_union(value: Any, members: tuple[Any, ...]) -> Any:
    """The member that the value already is, else the first that it can be read as."""
    exact = [m for m in members if type(value) is (get_origin(m) or m)]
    for member in [*exact, *members]:
        try:
            return _convert(value, member)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _convert_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise _WrongTypeError


def _convert_number(value: Any, kind: type) -> int | float:
    if isinstance(value, str):
        try:
            value = float(value) if kind is float or not value.strip().isdigit() else int(value)
        except ValueError:
            raise _WrongTypeError from None
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _WrongTypeError
    try:
        number = float(value)
    except OverflowError:
        raise _WrongTypeError from None
    if kind is float:
        return number
    if not number.is_integer():
        raise _WrongTypeError
    whole = value if isinstance(value, int) else int(number)
    if not -(2**63) <= whole < 2**64:
        raise ValueError(f"expected an integer of at most 64 bits, got {brief(value)}.")
    return whole


def _convert_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _WrongTypeError from None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        _check_size(value)
        return dict(value)
    raise _WrongTypeError


def _check_size(value: Any) -> None:
    """ValueError if ``value`` holds too many values, nested too deeply, or itself."""
    found = 0
    waiting = [(value, 1)]
    while waiting:
        inner, depth = waiting.pop()
        if isinstance(inner, str):
            check_text(inner)
        items: list[Any] = []
        if isinstance(inner, Mapping):
            items = [*inner, *inner.values()]
        elif isinstance(inner, (list, tuple)):
            items = list(inner)
        found += len(items)
        if found > MOST_VALUES:
            raise ValueError(f"holds more than {MOST_VALUES:,} values.")
        if depth > DEEPEST:
            raise ValueError(f"is nested more than {DEEPEST} levels deep, or holds itself.")
        waiting += [(item, depth + 1) for item in items]


def check_text(text: str) -> str:
    """``text``, unless it holds what no file name, no tokenizer and no UTF-8 can: ValueError."""
    for position, c in enumerate(text):
        if c == "\0" or "\ud800" <= c <= "\udfff":
            kind = "a NUL character" if c == "\0" else "half a surrogate pair"
            raise ValueError(f"expected text, got {brief(text)} with {kind} at {position}.")
    return text


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def _inside(number: float, limits: Mapping[str, float]) -> bool:
    return all(_COMPARE[sign](number, bound) for sign, bound in limits.items())


def _expected(value: Any, hint: Any, limits: Mapping[str, float]) -> str:
    given = "null" if value is None else brief(value)
    if not isinstance(value, (str, NoneType)):
        given += f" ({type(value).__name__})"
    choices = [choice for member in members_of(hint) for choice in _choices(member)]
    hint_text = did_you_mean(value, choices) if isinstance(value, str) else ""
    wanted = kind_of(hint, limits, null=True)
    return f"expected {wanted}, got {given}.{hint_text}"


def kind_of(hint: Any, limits: Mapping[str, float], *, null: bool = False) -> str:
    """The values that ``hint`` takes inside ``limits``, in words. null: with that one."""
    kinds = [_name(member) for member in members_of(hint) if null or member is not NoneType]
    bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in limits.items())
    return f"{' or '.join(kinds)}{' ' + bounds if bounds else ''}"


def members_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one that ``hint`` is."""
    return get_args(hint) if _is_union(hint) else (hint,)


def _choices(hint: Any) -> tuple[str, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return repr(choices[0]) if len(choices) == 1 else "one of " + ", ".join(choices)
    if get_origin(hint) in (list, tuple):
        return f"a list of {'numbers' if get_args(hint)[0] is float else 'names'}"
    if get_origin(hint) is dict:
        return "a mapping"
    if hint is Any:
        return "text or a list"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return "null" if hint is NoneType else names[hint]
