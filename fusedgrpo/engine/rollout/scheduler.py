"""Which sequences are decoded together: groups wait, enter, and leave one completion at a time.

Which completion is in flight beside which never changes what it says, only when it is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fusedgrpo.models.kv_cache import PagedCache, pages_of
from fusedgrpo.models.ragged_decode import Prompt, Row

# The seed of a completion, by the place of its prompt and its number.
SeedOf = Callable[[int, int], int]


@dataclass(eq=False, slots=True)
class Asked:
    """Completions that are asked for: ``samples`` of prompt ``index``, not started yet."""

    index: int
    ids: Sequence[int]
    samples: deque[int]
    prompt: Prompt | None = None
    live: list[Live] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Live:
    """A completion in flight. ids: its tokens, as far as they were read; logp: of those that it
    said. stopped: by a text that it has said. given: the spans of ``ids`` that it was given. turn:
    the number of its turn. waits: for an answer, and nothing of it is decoded. matcher: of its
    turn, where one has to match something."""

    asked: Asked
    sample: int
    row: Row
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False
    stopped: bool = False
    given: list[tuple[int, int]] = field(default_factory=list)
    turn: int = 0
    waits: bool = False
    matcher: Any = None

    @property
    def turn_ids(self) -> Sequence[int]:
        """The tokens that it has said since it was last given something."""
        return self.ids[self.given[-1][1] :] if self.given else self.ids


def pages_needed(lengths: Sequence[int], rows: int, most: int, at_once: int | None = None) -> int:
    """Pages that are enough for ``rows`` completions of ``most`` tokens at once, of prompts with
    these ``lengths``, ``at_once`` of them. The last token of a completion is never kept."""
    at_once = rows if at_once is None else min(rows, at_once)
    prompts = sorted(map(pages_of, lengths), reverse=True)[:at_once]
    return sum(prompts) + rows * pages_of(most - 1)


class Scheduler:
    """Prompts enter in the order given, their completions as places fall free: ``rows`` at most.

    allowed: how many of the prompts may have entered by now, None for all. The others may never.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        cache: PagedCache,
        rows: int,
        seed_of: SeedOf,
        allowed: Callable[[], int] | None = None,
    ):
        self._allowed = allowed or (lambda: len(asked))
        self._entered = 0
        self.waiting = deque(asked)
        self.groups: list[Asked] = []
        self.cache = cache
        self.seed_of = seed_of
        self._places = list(range(rows - 1, -1, -1))

    @property
    def busy(self) -> bool:
        return bool(self.groups) or self._may_enter > 0

    @property
    def _may_enter(self) -> int:
        """How many of the prompts that wait may enter."""
        return min(len(self.waiting), self._allowed() - self._entered)

    @property
    def live(self) -> list[Live]:
        """All that are decoded, those of one prompt adjacent."""
        return [live for group in self.groups for live in group.live if not live.waits]

    @property
    def unstarted(self) -> int:
        """How many completions wait, of prompts that may enter."""
        waiting = islice(self.waiting, max(self._may_enter, 0))
        return sum(len(group.samples) for group in (*self.groups, *waiting))

    def admit(self) -> tuple[list[Prompt], list[Live]]:
        """Fill the free places: the prompts that have to be read for it, and the completions."""
        unread: list[Prompt] = []
        new: list[Live] = []
        while self._places:
            group = next((group for group in self.groups if group.samples), None)
            if group is None:
                if self._may_enter <= 0:
                    break
                group = self.waiting.popleft()
                self._entered += 1
                group.prompt = Prompt(group.ids, self.cache.take(pages_of(len(group.ids))))
                self.groups.append(group)
                unread.append(group.prompt)
            assert group.prompt is not None
            sample = group.samples.popleft()
            row = Row(group.prompt, self._places.pop(), self.seed_of(group.index, sample))
            group.live.append(Live(group, sample, row))
            new.append(group.live[-1])
        return unread, new

    def finish(self, live: Live) -> None:
        """``live`` has ended: its pages and its place are free, and its prompt's with the last."""
        live.finished = True
        group = live.asked
        group.live.remove(live)
        self._places.append(live.row.place)
        self.cache.give_back(live.row.pages)
        if not group.live and not group.samples:
            assert group.prompt is not None
            self.cache.give_back(group.prompt.pages)
            self.groups.remove(group)
