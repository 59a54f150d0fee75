"""Long work before the first step says here how far it is, and whoever shows it listens.

As with logging, the work is done in every layer, and none of them knows who is looking. Where
nobody listens, nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """Told of one stage after the other. An ``at`` may come at any rate, and outside of stages."""

    def begin(self, what: str, counted: bool) -> None: ...
    def at(self, done: int, total: int | None, unit: str) -> None: ...
    def end(self) -> None: ...


_listener: Listener | None = None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` is told, unless somebody listens already."""
    global _listener
    if _listener is not None:
        yield
        return
    _listener = listener
    try:
        yield
    finally:
        _listener = None


class Unseen:
    """Listens and shows nothing: a run that has a panel says in it what it is about."""

    def begin(self, what: str, counted: bool) -> None: ...
    def at(self, done: int, total: int | None, unit: str) -> None: ...
    def end(self) -> None: ...


def are_shown() -> bool:
    """Whether somebody listens."""
    return _listener is not None


@contextmanager
def stage(what: str, *, counted: bool = False) -> Iterator[None]:
    """Work that may take long, in a few words: ``"loading the model"``. Stages follow each other.

    counted: it will tell how far it is, so that a log need not name it before it has taken long.
    """
    listener = _listener
    if listener is None:
        yield
        return
    listener.begin(what, counted)
    try:
        yield
    finally:
        listener.end()


def count(items: Iterable[T], unit: str, total: int | None = None) -> Iterator[T]:
    """``items``, and how many of them the stage has behind it. total: where ``items`` does not
    know its length."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    listener = _listener
    if listener is None:
        yield from items
        return
    for done, item in enumerate(items):
        listener.at(done, total, unit)
        yield item
