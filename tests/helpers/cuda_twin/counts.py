"""What is asked of the device, by kind and by the line of code that asks."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

HERE = str(Path(__file__).parent)
REPOSITORY = str(Path(__file__).parents[3])
# Whose lines say nothing about who asked.
LIBRARIES = ("/torch/", "/triton/", "/numpy/", "/lib/python3")
OURS = str(Path(REPOSITORY, "fusedgrpo"))

Kind = Literal["launches", "waits", "copies", "casts"]
# The innermost line that is not a library's, and the innermost of ours: file and number.
Site = tuple[tuple[str, int], ...]


@dataclass
class Counts:
    """Each ``what @ where``, how often.

    launches: operators that compute on the device, and Triton kernels; an operator of a library may
    be several kernels. waits: the host waits until everything that was launched is done. copies:
    between the devices, ``pageable`` where a copy is staged by the driver, which holds the host up
    whether it was asked to wait or not. casts: of tensors of the device to another dtype.
    """

    launches: Counter[tuple[str, Site]] = field(default_factory=Counter)
    waits: Counter[tuple[str, Site]] = field(default_factory=Counter)
    copies: Counter[tuple[str, Site]] = field(default_factory=Counter)
    casts: Counter[tuple[str, Site]] = field(default_factory=Counter)

    def plain(self) -> dict[str, dict[str, int]]:
        """To be written as JSON."""
        return {kind: _named(counter) for kind, counter in vars(self).items()}


def marginal(more: Counts, fewer: Counts, units: int) -> dict[str, dict[str, float]]:
    """What each of the ``units`` costs that ``more`` had and ``fewer`` had not."""
    found = {}
    for kind, counter in more.plain().items():
        before = fewer.plain()[kind]
        names = dict.fromkeys([*counter, *before])
        each = {name: (counter.get(name, 0) - before.get(name, 0)) / units for name in names}
        found[kind] = {name: cost for name, cost in each.items() if cost}
    return found


class Counting:
    """Counts into all ``Counts`` that are open."""

    def __init__(self) -> None:
        self._open: list[Counts] = []
        self.launched = 0  # since the process began

    @contextlib.contextmanager
    def opened(self) -> Iterator[Counts]:
        counts = Counts()
        self._open.append(counts)
        try:
            yield counts
        finally:
            self._open.remove(counts)

    def note(self, kind: Kind, what: str) -> None:
        self.launched += kind == "launches"
        if self._open:
            key = what, call_site()
            for counts in self._open:
                getattr(counts, kind)[key] += 1


def call_site() -> Site:
    """Who called: see ``Site``."""
    found: list[tuple[str, int]] = []
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        ours = file.startswith(OURS)
        if ours or (not found and _says_something(file)):
            found.append((file, frame.f_lineno))
        if ours:
            break
        frame = frame.f_back
    return tuple(found)


@functools.cache
def _says_something(file: str) -> bool:
    inside = file.split("/site-packages", 1)[-1]
    return not file.startswith((HERE, "<")) and not any(part in inside for part in LIBRARIES)


def _named(counter: Counter[tuple[str, Site]]) -> dict[str, int]:
    named: Counter[str] = Counter()
    for (what, site), times in counter.items():
        named[f"{what} @ {_written(site)}"] += times
    return dict(named.most_common())


def _written(site: Site) -> str:
    return " < ".join(f"{_short(file)}:{line}" for file, line in site) or "a test"


def _short(file: str) -> str:
    return file.split("/site-packages/")[-1].removeprefix(REPOSITORY + "/")
