"""Who writes into an output directory: a lock file with the process, its host, and a heartbeat."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fusedgrpo.errors import OutputDirError

LOCK_NAME = "run.lock"

# A process on another host, or in another container, cannot be asked whether it lives. Its lock
# file is touched this often, and is a dead one's when it has not been for so long.
BEAT_SECONDS = 30.0
STALE_SECONDS = 300.0


class Heartbeat:
    """Touches this process's lock in ``directory`` until it is stopped."""

    def __init__(self, directory: Path, every: float = BEAT_SECONDS):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(directory, every), daemon=True)
        self._thread.start()

    def _beat(self, directory: Path, every: float) -> None:
        lock = directory / LOCK_NAME
        while not self._stop.wait(every):
            # Not somebody else's. An error passes, or shows where the run itself writes.
            with contextlib.suppress(OSError):
                if _read(lock) == _identity():
                    os.utime(lock)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def take_lock(directory: Path) -> list[str]:
    """Write our lock, or raise OutputDirError if a living run has one; returns what there is to
    say."""
    lock = directory / LOCK_NAME
    said = []
    with _one_at_a_time(directory):
        holder = _read(lock)
        if holder is not None:
            alive, why = _is_alive(holder, lock)
            if alive:
                raise OutputDirError(
                    f"output_dir {str(directory)!r} is in use by {_who(holder)}{why}. Give another "
                    f"output_dir, or end that run; if it is gone for certain, delete {str(lock)!r}."
                )
            said.append(f"Taking over {directory}: {_who(holder)} left its lock there{why}.")
        # Also the probe: a directory that cannot be written fails here, before any model loads.
        with lock.open("w") as file:
            json.dump(_identity(), file)
    return said


def give_lock_back(directory: Path) -> None:
    """Remove the lock, if it is ours."""
    lock = directory / LOCK_NAME
    if _read(lock) == _identity():
        with contextlib.suppress(OSError):  # then it is a dead process's, as after a kill
            lock.unlink(missing_ok=True)


def holder_of(directory: Path) -> str | None:
    """The other run that has the lock now, in words; None if we have it or nobody does."""
    holder = _read(directory / LOCK_NAME)
    return None if holder in (None, _identity()) else _who(holder or {})


def is_held(directory: Path) -> bool:
    """Whether a living run has the lock, to somebody who only reads: nothing is written."""
    lock = directory / LOCK_NAME
    holder = _read(lock)
    if holder is None:
        return False
    try:
        return _is_alive(holder, lock, seconds_silent=_by_own_clock)[0]
    except FileNotFoundError:  # it was given back just now
        return False


def _who(holder: dict[str, object]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _start_time(pid: int) -> str | None:
    """When ``pid`` started, in ticks since boot; tells it from a later process of that number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def _boot() -> str | None:
    """Which start of the machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _identity() -> dict[str, object]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "started": _start_time(pid),
        "boot": _boot(),
        "beats": BEAT_SECONDS,
    }


def _read(lock: Path) -> dict[str, object] | None:
    try:
        holder = json.loads(lock.read_text())
    except (OSError, ValueError):  # none there, or torn; one we may not read we cannot write either
        return None
    return holder if isinstance(holder, dict) else None


def _seconds_since_touched(lock: Path) -> float:
    """By the clock of the file system, which may be another's than ours."""
    probe = lock.with_name(f".{LOCK_NAME}.{os.getpid()}.now")
    try:
        probe.touch()
        return probe.stat().st_mtime - lock.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _by_own_clock(lock: Path) -> float:
    """The same where nothing may be written, as far as the clocks agree."""
    return time.time() - lock.stat().st_mtime


def _is_alive(
    holder: dict[str, object],
    lock: Path,
    seconds_silent: Callable[[Path], float] = _seconds_since_touched,
) -> tuple[bool, str]:
    """Whether the process that wrote the lock lives, and how that is known.

    One of this host is looked up. Of another host's, its heartbeat is all that is known; without
    one it is taken to live.
    """
    if holder.get("host") != socket.gethostname():
        if "beats" not in holder:
            return True, ""
        silent = seconds_silent(lock)
        if silent > STALE_SECONDS:
            return False, f" and has not been heard of for {silent / 60:.0f} minutes"
        wait = STALE_SECONDS - silent
        return True, (
            f", which was heard of {silent:.0f} seconds ago (if it is gone, its lock can be taken "
            f"over in {wait / 60:.0f} minutes)"
        )
    gone = " and is gone"
    boot = _boot()
    if None not in (boot, holder.get("boot")) and holder["boot"] != boot:
        return False, gone
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False, gone
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False, gone
    except PermissionError:
        pass  # it lives, under another user
    started = _start_time(pid)
    alive = None in (started, holder.get("started")) or started == holder["started"]
    return (True, "") if alive else (False, gone)


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
