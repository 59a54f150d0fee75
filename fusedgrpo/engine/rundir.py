"""The output directory of one run: where everything lies, and that nobody else is writing there."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fusedgrpo.engine.plain_log import LOG_FORMAT, PlainFormatter
from fusedgrpo.errors import FusedGRPOError, OutputDirError, reason

logger = logging.getLogger("fusedgrpo")

LOCK_NAME = "run.lock"

# What a run writes. A fresh run moves (or, with overwrite, deletes) these and touches nothing else.
RUN_ENTRIES = (
    "config.resolved.yaml",
    "metrics.jsonl",
    "metrics.dropped.jsonl",
    "skipped_rows.jsonl",
    "run.log",
    "report.html",
    "completions",
    "plots",
    "trackers",
    "checkpoints",
    "adapter",
)


class RunDir:
    """An output directory that this process holds. Made by :meth:`open`, given back by ``close``.

    Attributes: ``path`` (the directory) and, inside it, ``config``, ``metrics``, ``skipped_rows``,
    ``log``, ``report`` (files), ``completions``, ``plots``, ``trackers``, ``checkpoints``,
    ``adapter`` (directories, made by whoever first writes to them).
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.resolved.yaml"
        self.metrics = path / "metrics.jsonl"
        self.skipped_rows = path / "skipped_rows.jsonl"
        self.log = path / "run.log"
        self.report = path / "report.html"
        self.completions = path / "completions"
        self.plots = path / "plots"
        self.trackers = path / "trackers"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self._log_handlers: list[logging.Handler] = []

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
            said = _take_lock(run.path)
            if not resume:
                said += _clear(run.path, overwrite=overwrite)
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
            said = _take_lock(run.path)
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
        file = logging.FileHandler(self.log, encoding="utf-8")
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

    def close(self) -> None:
        """Stop the log and give the lock back. May be called twice."""
        for handler in self._log_handlers:
            logger.removeHandler(handler)
            handler.close()
        self._log_handlers.clear()
        lock = self.path / LOCK_NAME
        if _read_lock(lock) == _identity():
            lock.unlink(missing_ok=True)

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
        """What ended the run, in its log; where nobody foresaw it, with its traceback. The terminal
        gets it from whoever catches it."""
        foreseen = isinstance(error, FusedGRPOError)
        cause = None if foreseen else (type(error), error, error.__traceback__)
        text = f"The run failed: {reason(error)}"
        record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), cause)
        for handler in self._log_handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)


def _start_time(pid: int) -> str | None:
    """When ``pid`` started, in ticks since boot; tells it from a later process of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _identity() -> dict[str, object]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _start_time(pid)}


def _read_lock(lock: Path) -> dict[str, object] | None:
    try:
        holder = json.loads(lock.read_text())
    except (OSError, ValueError):  # none there, or torn; one we may not read we cannot write either
        return None
    return holder if isinstance(holder, dict) else None


def _is_alive(holder: dict[str, object]) -> bool:
    """Whether the process that wrote the lock lives; on another host it is taken to."""
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, under another user
    started = _start_time(pid)
    return None in (started, holder.get("started")) or started == holder["started"]


@contextlib.contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Let one process at a time look at the lock file and replace it.

    The directory carries this short lock because, unlike the lock file, it is never unlinked.
    """
    fd = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no flock
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _take_lock(directory: Path) -> list[str]:
    """Write our lock, or raise if a living run has one; returns what there is to say."""
    lock = directory / LOCK_NAME
    said = []
    with _one_at_a_time(directory):
        holder = _read_lock(lock)
        if holder is not None:
            who = f"process {holder.get('pid')} on {holder.get('host')}"
            if _is_alive(holder):
                raise OutputDirError(
                    f"output_dir {str(directory)!r} is in use by {who}. Give another output_dir, "
                    f"or end that run; if it is gone for certain, delete {str(lock)!r}."
                )
            said.append(f"Taking over {directory}: {who} left its lock there and is gone.")
        # Also the probe: a directory that cannot be written fails here, before any model loads.
        with lock.open("w") as file:
            json.dump(_identity(), file)
    return said


def _clear(directory: Path, *, overwrite: bool) -> list[str]:
    """Put an earlier run's files out of the way; returns what there is to say."""
    found = [directory / name for name in RUN_ENTRIES if os.path.lexists(directory / name)]
    if not found:
        return []
    # Without its log this is no run of ours, so nothing is deleted however firmly it was asked for.
    if overwrite and (directory / "run.log").exists():
        for entry in found:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        return [f"Deleted the earlier run in {directory} (overwrite_output_dir)."]
    previous = directory / "previous"
    taken = [int(child.name) for child in previous.glob("*") if child.name.isdecimal()]
    target = previous / f"{max(taken, default=0) + 1:03d}"
    target.mkdir(parents=True)
    for entry in found:
        entry.rename(target / entry.name)
    return [f"Moved the earlier run in {directory} to {target}."]
