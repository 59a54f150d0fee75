"""Writing to a disk that may refuse: tried again while that can help, and then the run ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fusedgrpo.engine.checkpoint_files import why_not_written
from fusedgrpo.engine.reporting.run_dir import RunDir
from fusedgrpo.errors import OutputDirError

log = logging.getLogger("fusedgrpo")

T = TypeVar("T")

ATTEMPTS = 3
PAUSE_SECONDS = 1.0


@contextmanager
def writing_to(directory: Path) -> Iterator[None]:
    """Turn whatever the disk refuses inside into an OutputDirError."""
    try:
        yield
    except Exception as error:
        why = why_not_written(error)
        if why is None or isinstance(error, OutputDirError):
            raise
        raise OutputDirError(f"{str(directory)!r} cannot be written: {why}.") from error


class Refusals:
    """Counts what the disk of a run would not take, by what it was, since it last took that."""

    def __init__(self, run: RunDir):
        self.run = run
        self._failed_at: dict[str, list[int]] = {}

    def writing(
        self, what: str, step: int, work: Callable[[], T], *, insist: bool = False
    ) -> T | None:
        """The result of ``work``; None if the disk would not take it, for once.

        That is said, and whoever asked is to try again with the next step: a disk that is full
        tonight may have room tomorrow. Raises OutputDirError in the third such step in a row, at
        the third attempt where there is no next step (``insist``), and if the directory is gone.
        """
        self.run.check()
        failed = self._failed_at.setdefault(what, [])
        for attempt in range(ATTEMPTS):
            try:
                result = work()
            except OutputDirError:
                raise
            except Exception as error:
                why = why_not_written(error)
                if why is None:
                    raise
                if attempt + 1 < ATTEMPTS and insist:
                    time.sleep(PAUSE_SECONDS)
                    continue
                if step not in failed:
                    failed.append(step)
                if insist or len(failed) >= ATTEMPTS:
                    raise OutputDirError(
                        f"{what} of step {step} could not be written to {str(self.run.path)!r}: "
                        f"{why} ({ATTEMPTS} attempts). Make room there, then go on with "
                        "resume_from_checkpoint: auto."
                    ) from error
                log.warning(
                    "%s of step %d could not be written (%s); tried again with the next step.",
                    *(what, step, why),
                )
                return None
            failed.clear()
            return result
        raise AssertionError("the last attempt returns or raises")
