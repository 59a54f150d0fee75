"""How far a rollout is: tokens so far, completions in flight and waiting, tokens a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fusedgrpo.engine.execution import Count, Report

# Seconds of a rollout until something is shown, and from there to the next time.
OVERWRITTEN = (2.0, 0.5)
LOGGED = (30.0, 60.0)


class RolloutProgress:
    """The ``progress`` of an ``Execution``: entered around a rollout, it gives what is to be called
    with the counts. Until something is due, that costs one look at the clock.

    show: takes each text. overwrites: each takes the place of the one before, the first comes soon,
    and an empty one at the end takes the last away; else texts are lines of a log, and few.
    clock: seconds.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        overwrites: bool,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._show = show
        self._overwrites = overwrites
        self._clock = clock

    @contextmanager
    def __call__(self) -> Iterator[Report]:
        after, every = OVERWRITTEN if self._overwrites else LOGGED
        started = self._clock()
        due = started + after
        total: Count = 0
        shown = False

        def report(tokens: Count, live: Count, waiting: int) -> None:
            nonlocal due, total, shown
            total = total + tokens
            now = self._clock()
            if now < due:
                return
            due = now + every
            shown = True
            self._show(
                f"sampling: {int(total):,} tokens, {int(live):,} live, {waiting:,} waiting, "
                f"{int(total) / (now - started):,.0f} tokens/s"
            )

        try:
            yield report
        finally:
            if shown and self._overwrites:
                self._show("")
