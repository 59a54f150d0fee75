"""Copies of what reward functions are called with, so that none can change what others see."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("fusedgrpo")

_IMMUTABLE = (str, int, float, bool, bytes, complex, type(None))
_said: set[tuple[str, type]] = set()


def own_copy(value: Any, what: str) -> Any:
    """A copy of ``value`` that shares nothing with it that can change.

    An object that cannot be copied (one that holds a lock, a generator) is handed over itself; the
    log says so once for each ``what``.
    """
    return _copied(value, lambda other: _deep_copy(other, what))


def own_containers(value: Any) -> Any:
    """A copy of the lists, dicts and sets in ``value``; other objects (a client, a model) are the
    same ones."""
    return _copied(value, lambda other: other)


def _copied(value: Any, otherwise: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return [_copied(item, otherwise) for item in value]
    if kind is dict:
        return {key: _copied(item, otherwise) for key, item in value.items()}
    if kind is tuple:
        return tuple([_copied(item, otherwise) for item in value])
    if kind is set:
        return set(value)  # what can be in a set does not change
    return otherwise(value)


def _deep_copy(value: Any, what: str) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception as error:  # noqa: BLE001 - whatever the object's own class raises
        key = (what, type(value))
        if key not in _said:
            _said.add(key)
            logger.warning(
                "%s holds a %s that cannot be copied (%s): all completions and reward functions "
                "are given the same one",
                *(what, type(value).__name__, error),
            )
        return value
