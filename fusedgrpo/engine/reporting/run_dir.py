"""The output directory of one run: where everything lies, and that nobody else is writing there."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fusedgrpo.engine.earlier_run import clear
from fusedgrpo.engine.reporting.plain_log import LOG_FORMAT, PlainFormatter
from fusedgrpo.engine.reporting.run_lock import Heartbeat, give_lock_back, holder_of, take_lock
from fusedgrpo.errors import FusedGRPOError, OutputDirError, reason

logger = logging.getLogger("fusedgrpo")

# What a run writes: attribute of ``RunDir`` -> name. A fresh run moves (or, with overwrite,
# deletes) these and touches nothing else; whoever writes something new adds it here.
FILES = {
    "config": "config.resolved.yaml",
    "metrics": "metrics.jsonl",
    "dropped": "metrics.dropped.jsonl",
    "skipped_rows": "skipped_rows.jsonl",
    "log": "run.log",
    "report": "report.html",
    "facts": "run.json",
}
DIRECTORIES = {
    "completions": "completions",
    "eval_completions": "eval_completions",
    "held_out": "held_out",
    "drift": "drift",
    "plots": "plots",
    "trackers": "trackers",
    "checkpoints": "checkpoints",
    "model": "model",
    "nonfinite": "nonfinite",
}
# What the command line makes of a run when it is over.
AFTERWARDS = ("merged", "evaluations")
RUN_ENTRIES = (*FILES.values(), *DIRECTORIES.values(), "adapter", *AFTERWARDS)


class RunDir:
    """An output directory that this process holds. Made by :meth:`open`, given back by ``close``.

    Attributes: ``path`` (the directory) and, inside it, those of ``FILES`` and ``DIRECTORIES``,
    each made by whoever first writes to it.
    """

    config: Path
    metrics: Path
    dropped: Path
    skipped_rows: Path
    log: Path
    report: Path
    facts: Path
    completions: Path
    eval_completions: Path
    held_out: Path
    drift: Path
    plots: Path
    trackers: Path
    checkpoints: Path
    model: Path
    nonfinite: Path

    def __init__(self, path: Path):
        self.path = path
        for attribute, name in (FILES | DIRECTORIES).items():
            setattr(self, attribute, path / name)
        self._log_handlers: list[logging.Handler] = []
        self._heartbeat: Heartbeat | None = None
        self._inode: tuple[int, int] | None = None

    @classmethod
    def open(cls, path: str | Path, *, overwrite: bool = False, resume: bool = False) -> RunDir:
        """Create, lock and clear the directory, and start writing the log to ``run.log``.

        What an earlier run left is moved to ``previous/NNN/``; ``overwrite`` deletes it instead,
        ``resume`` leaves it in place.

        Raises:
            OutputDirError: the directory cannot be written, or a living run holds it.
        """
        run = cls(Path(path).expanduser().absolute())
        with run._closed_on_failure():
            run.path.mkdir(parents=True, exist_ok=True)
            said = take_lock(run.path)
            run._inode = _inode(run.path)
            run._heartbeat = Heartbeat(run.path)
            if not resume:
                said += clear(run.path, RUN_ENTRIES, overwrite=overwrite)
            run._start_log()
        for message in said:
            logger.warning(message)
        return run

    @classmethod
    def probe(cls, path: str | Path) -> None:
        """Raise now what ``open`` would raise later; leaves nothing behind but the directory."""
        run = cls(Path(path).expanduser().absolute())
        with run._closed_on_failure():
            run.path.mkdir(parents=True, exist_ok=True)
            said = take_lock(run.path)
        run.close()
        for message in said:
            logger.warning(message)

    @contextlib.contextmanager
    def _closed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OutputDirError:
            raise
        except OSError as error:
            self.close()
            raise OutputDirError(
                f"output_dir {str(self.path)!r} cannot be written: {error.strerror or error}. "
                "Give another output_dir, or make this one a directory you may write to."
            ) from error

    def _start_log(self) -> None:
        file = _LogFile(self.log, encoding="utf-8")
        file.setFormatter(PlainFormatter(LOG_FORMAT))
        self._log_handlers.append(file)
        if logging.lastResort and not logger.hasHandlers():
            # Where nobody set up logging, Python shows warnings on stderr, but only as long as
            # there is no handler at all: the one for the file must not silence the terminal.
            self._log_handlers.append(logging.lastResort)
        for handler in self._log_handlers:
            logger.addHandler(handler)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)  # else the root's WARNING keeps the log all but empty

    def check(self) -> None:
        """Raise OutputDirError if the directory is no longer the one that this process holds."""
        try:
            found = _inode(self.path)
        except FileNotFoundError:
            found = None
        if found != self._inode:
            raise OutputDirError(
                f"output_dir {str(self.path)!r} was deleted or replaced while the run was writing "
                "there."
            )
        taken_by = holder_of(self.path)
        if taken_by is not None:
            raise OutputDirError(
                f"output_dir {str(self.path)!r} was taken over by {taken_by} while this run was "
                "writing there: two runs cannot share it."
            )

    def close(self) -> None:
        """Stop the log and give the lock back. May be called twice."""
        for handler in self._log_handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # what a full disk did not take
                handler.close()
        self._log_handlers.clear()
        if self._heartbeat is not None:
            self._heartbeat.stop()
        give_lock_back(self.path)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            self._log_failure(error)
        self.close()

    def _log_failure(self, error: Exception) -> None:
        """Write into the log what ended the run; where nobody foresaw it, with its traceback. The
        terminal gets it from whoever catches it."""
        foreseen = isinstance(error, FusedGRPOError)
        cause = None if foreseen else (type(error), error, error.__traceback__)
        text = f"The run failed: {reason(error)}"
        record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), cause)
        for handler in self._log_handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)


class _LogFile(logging.FileHandler):
    """run.log. What it cannot write is said once, on stderr, and no traceback."""

    _said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and not self._said:
            self._said = True
            sys.stderr.write(f"{self.baseFilename} cannot be written: {error.strerror or error}\n")
        elif not isinstance(error, OSError):
            super().handleError(record)


def _inode(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
