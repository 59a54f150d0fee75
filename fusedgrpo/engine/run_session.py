"""One session of a run in ``run.json``: begun when it starts, and ended however it ends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fusedgrpo.engine.reporting.run_logger import RunLogger
from fusedgrpo.engine.reporting.run_record import RunRecord, ended_by
from fusedgrpo.engine.run_description import described, measured, session
from fusedgrpo.errors import OutputDirError

log = logging.getLogger("fusedgrpo")


@contextmanager
def recorded_session(trainer: Any, outputs: RunLogger) -> Iterator[Callable[[], None]]:
    """Around the training of ``trainer``. What it gives is to be called when all steps are done,
    for reports that are written after that but before the session is over.

    Raises OutputDirError if the file cannot be written at first; later that is only said.
    """
    if not outputs.writes:
        yield lambda: None
        return
    record = RunRecord(outputs.run.facts, described(trainer))
    record.begin(session(trainer))
    outputs.writing("run.json", trainer.progress.step, record.write, insist=True)

    def end(how: str) -> None:
        record.facts["memory"]["measured"] = measured(trainer)
        record.end(how, trainer.progress.step)
        try:
            outputs.run.check()
            record.write()
        except (OSError, OutputDirError) as error:  # it tells of the run, and is not worth one
            log.warning("%s could not be written: %s", record.path, error)

    try:
        yield lambda: end("finished")
    except BaseException as error:
        end(ended_by(error))
        raise
    end("finished")
