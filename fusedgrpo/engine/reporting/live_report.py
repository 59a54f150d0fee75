"""``report.html`` while a run goes on: written now and then, and never at the cost of the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from fusedgrpo.engine.reporting.report import write_report

log = logging.getLogger("fusedgrpo")

FIRST = 20.0  # seconds into the run
PAUSE = 60.0  # at least, between two pages
SHARE = 0.01  # of the run's time that its pages may take


class LiveReport:
    """Ask it after each step whether a page is due. ``run_dir`` has the run's files, and ``path``
    is the page. What goes wrong with a page is said once and does not end the run."""

    def __init__(
        self, run_dir: Path, path: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run_dir = run_dir
        self._path = path
        self._clock = clock
        self._due = clock() + FIRST
        self._failed = False

    def after_step(self) -> None:
        """Write the page of a run that goes on, if one is due and there is a step to show."""
        started = self._clock()
        if started < self._due or not self._has_rows():
            return
        self._write(live=True)
        ended = self._clock()
        self._due = ended + max(PAUSE, (ended - started) / SHARE)

    def last(self) -> None:
        """Write the page of a run that has ended before its time, as far as it came."""
        if self._has_rows():
            self._write(live=False)

    def _has_rows(self) -> bool:
        metrics = self._run_dir / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > 0

    def _write(self, *, live: bool) -> None:
        try:
            write_report(self._run_dir, self._path, live=live, pictures=False)
        except Exception as error:  # noqa: BLE001 - a full disk, or a fault of ours: no run ends by it
            if not self._failed:
                log.warning("%s could not be written: %s. The run goes on.", self._path, error)
            self._failed = True
