"""A Python process for other people's code: started clean, dead when the trainer is, not trusted.

Requests go to it and numbered answers come back, of plain values only: nothing that such a process
sends is run in the trainer. It is no sandbox.
"""

from __future__ import annotations

import ctypes
import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import fusedgrpo

GRACE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1

# The child sees the trainer's modules, whatever its own path would be, and this very fusedgrpo,
# wherever on that path another one is.
_BOOT = """
import sys
fd, parent, package, module, *sys.path = sys.argv[1:]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("fusedgrpo", package)
sys.modules["fusedgrpo"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["fusedgrpo"])
from importlib import import_module
import_module(module).serve(int(fd), int(parent))
"""

# Every message begins with the number of the request that it is, or answers.
_NUMBER_BYTES = 8
# Of an answer. A line of text that something has printed into the pipe announces more than this.
_LARGEST_REPLY = 1 << 28


class GarbledReply(Exception):
    """Something wrote else than an answer into the trainer's pipe."""


class Requests:
    """The trainer's end of a connection. classes: those that an answer may hold beside built-in
    values."""

    def __init__(self, connection: Connection, classes: Sequence[type] = ()):
        self.connection = connection
        self._classes = classes
        self._number = 0

    def send(self, message: bytes) -> None:
        """A pickled request. Where the other end is gone, :meth:`receive` says so."""
        self._number += 1
        with suppress(OSError):
            self.connection.send_bytes(_numbered(self._number, message))

    def receive(self, limit: int = _LARGEST_REPLY) -> tuple[Any, ...] | None:
        """An answer to the last request, None for a late one to a request before it.

        limit: of its bytes. Waits until there is something to read. Raises EOFError where the other
        end is closed, :class:`GarbledReply`.
        """
        try:
            message = self.connection.recv_bytes(limit)
        except OSError as error:
            raise EOFError from error
        number = int.from_bytes(message[:_NUMBER_BYTES], "big")
        if len(message) < _NUMBER_BYTES or number > self._number:
            raise GarbledReply
        if number < self._number:
            return None
        return plain_tuple(message[_NUMBER_BYTES:], self._classes)


class Answers:
    """The process's own end."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._own = os.getpid()
        self._number = 0

    def receive(self) -> bytes:
        """The next request, pickled. Raises EOFError when the trainer wants no more."""
        message = self._connection.recv_bytes()
        self._number = int.from_bytes(message[:_NUMBER_BYTES], "big")
        return message[_NUMBER_BYTES:]

    def send(self, *answer: Any) -> None:
        """Answer the request that was received last."""
        if os.getpid() != self._own:
            os._exit(0)  # their code forked and returned twice: one of them answers
        self._connection.send_bytes(_numbered(self._number, pickle.dumps(answer)))


class ChildProcess:
    """A process that runs ``serve(fd, parent)`` of a module of ours, in a session of its own: so
    Ctrl-C reaches the trainer only, and what it starts can be killed with it.

    path: its ``sys.path``. ``serve`` has to begin with :func:`begin`.
    """

    def __init__(self, module: str, path: Sequence[str]):
        self.connection, theirs = Pipe()
        package = os.path.abspath(str(fusedgrpo.__file__))
        arguments = [str(theirs.fileno()), str(os.getpid()), package, module, *path]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", _BOOT, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self.end = weakref.finalize(self, _end, self.process, self.connection, os.getpid())

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, by itself or not."""
        return self.process.poll() is not None

    def wait(self, deadline: float, check_interrupt: Callable[[], None]) -> None:
        """Until there is something to read. It is killed at the deadline (of ``time.monotonic``)
        and where ``check_interrupt``, which is called meanwhile, raises.

        Raises TimeoutError at the deadline, EOFError where it is gone.
        """
        while not self.connection.poll(max(0.0, min(0.5, deadline - time.monotonic()))):
            try:
                check_interrupt()
            except BaseException:
                self.kill()
                raise
            # What it started may hold the pipe open after it is gone.
            if self.is_gone and not self.connection.poll(0):
                raise EOFError
            if time.monotonic() >= deadline:
                self.kill()
                raise TimeoutError

    def kill(self) -> None:
        """End it now, and what it has started in its session."""
        if self.end.alive:  # else its id may be somebody else's by now
            _kill_session(self.process)
        self.end()

    def how_it_died(self) -> str:
        """In words; what is left of it is killed."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        code = self.process.poll()
        self.kill()
        return death_in_words(code)


def death_in_words(code: int | None) -> str:
    """How a process ended: its exit code, minus a signal's number, or None if it has not."""
    if code is None:
        return "it closed the trainer's pipe, or wrote into it"
    if code >= 0:
        return f"exit code {code}"
    memory = ", as when memory runs out" if code == -signal.SIGKILL else ""
    return f"signal {-code} ({signal.strsignal(-code)}){memory}"


def begin(fd: int, parent: int, name: str) -> Connection:
    """In the process, before all else. name: what it is called in ``sys.argv``."""
    die_with(parent, signal.SIGKILL)
    os.set_inheritable(fd, False)
    sys.argv = [name]
    return Connection(fd)


def die_with(parent: int, number: int) -> None:
    """Have the signal ``number`` sent when ``parent`` dies, where the system does that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def plain_tuple(message: bytes, classes: Sequence[type] = ()) -> tuple[Any, ...]:
    """A pickled tuple of built-in values and of ``classes``. Raises :class:`GarbledReply`."""
    try:
        answer = _PlainUnpickler(message, classes).load()
    except Exception as error:  # bytes that are no pickle raise anything
        raise GarbledReply from error
    if not isinstance(answer, tuple) or not answer:
        raise GarbledReply
    return answer


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, message: bytes, classes: Sequence[type]):
        super().__init__(io.BytesIO(message))
        self._classes = {(each.__module__, each.__qualname__): each for each in classes}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._classes:
            return self._classes[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a reply")


def _numbered(number: int, message: bytes) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "big") + message


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone; macOS says it the second way
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer: the child is not its to end
        return
    if not connection.closed:
        # Not closed only: a fork of the trainer may have it open, too.
        same = socket.socket(fileno=connection.fileno())
        with suppress(OSError):  # the process has ended
            same.shutdown(socket.SHUT_RDWR)
        same.detach()
        connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _kill_session(process)
    process.wait()
