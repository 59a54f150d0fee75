"""Which sequences are decoded together: groups wait, enter, and leave one completion at a time.

Which completion is in flight beside which never changes what it says, only when it is said.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    """A completion in flight. ids, logp: of what it has said, as far as it was read. stopped: by a
    text that it has said."""

    asked: Asked
    sample: int
    row: Row
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    finished: bool = False
    stopped: bool = False


def pages_needed(lengths: Sequence[int], rows: int, most: int) -> int:
    """Pages that are enough for ``rows`` completions of ``most`` tokens at once, of prompts with
    these ``lengths``. The last token of a completion is never kept."""
    prompts = sorted(map(pages_of, lengths), reverse=True)[:rows]
    return sum(prompts) + rows * pages_of(most - 1)


class Scheduler:
    """Prompts enter in the order given, their completions as places fall free: ``rows`` at most."""

    def __init__(self, asked: Sequence[Asked], cache: PagedCache, rows: int, seed_of: SeedOf):
        self.waiting = deque(asked)
        self.groups: list[Asked] = []
        self.cache = cache
        self.seed_of = seed_of
        self._places = list(range(rows - 1, -1, -1))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.groups)

    @property
    def live(self) -> list[Live]:
        """All in flight, those of one prompt adjacent."""
        return [live for group in self.groups for live in group.live]

    @property
    def unstarted(self) -> int:
        """How many completions wait."""
        return sum(len(group.samples) for group in (*self.groups, *self.waiting))

    def admit(self) -> tuple[list[Prompt], list[Live]]:
        """Fill the free places: the prompts that have to be read for it, and the completions."""
        unread: list[Prompt] = []
        new: list[Live] = []
        while self._places:
            group = next((group for group in self.groups if group.samples), None)
            if group is None:
                if not self.waiting:
                    break
                group = self.waiting.popleft()
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
