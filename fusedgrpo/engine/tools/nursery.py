"""The process that has imported the tools of a run, and forks one for each completion.

It runs nothing of the user's but their imports, so that it is always there to end its forks: at the
trainer's word and, on Linux, whenever the trainer dies, with all that they have started.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from fusedgrpo.engine.child_process import (
    Answers,
    ChildProcess,
    GarbledReply,
    begin,
    die_with,
    plain_tuple,
)
from fusedgrpo.engine.tools.acting import act
from fusedgrpo.engine.tools.loading import Loaded, load
from fusedgrpo.engine.tools.spec import LOADING_SECONDS, ToolSet
from fusedgrpo.errors import ToolError, reason

# Bytes that a fork's prints may come to before the rest is dropped, and those of all together.
SHOWN_OF_ONE = 4_000
SHOWN_OF_ALL = 1_000_000
# What a message between two processes may take once it has begun.
_MESSAGE_SECONDS = 60
# For processes that fork faster than they are killed.
_ENDING_SECONDS = 10
_PR_SET_CHILD_SUBREAPER = 36
# A word of the trainer's: s to start a process, with its end of a socket, or e to end one; which.
_REQUEST = struct.Struct("!cQ")


class Nursery:
    """The trainer's end. Raises :class:`ToolError` where the tools cannot be loaded."""

    def __init__(self, tools: ToolSet, check_interrupt: Callable[[], None]):
        self._child = ChildProcess(__name__, tools.path)
        self.connection = self._child.connection
        self._socket = _socket_of(self.connection)
        try:
            with suppress(ConnectionError):
                self.connection.send_bytes(pickle.dumps(tools.sources))
            self._child.wait(time.monotonic() + LOADING_SECONDS, check_interrupt)
            answer = plain_tuple(self.connection.recv_bytes(1 << 20))
        except TimeoutError:
            raise ToolError(f"loading the tools took more than {LOADING_SECONDS:g} s") from None
        except (EOFError, OSError, GarbledReply):
            how = self._child.how_it_died()
            raise ToolError(f"the process that loads the tools died: {how}") from None
        if answer[0] == "refused":
            self._child.kill()
            raise ToolError(answer[1])

    def fork(self, number: int) -> Connection:
        """A new process under this number. Raises :class:`ToolError` where there are too many."""
        try:
            try:
                ours, theirs = socket.socketpair()
            except OSError:
                _allow_more_files()
                ours, theirs = socket.socketpair()
        except OSError as error:
            raise ToolError(
                f"no process for another completion: {reason(error)}. Each open environment takes "
                "an open file: raise the hard limit (ulimit -Hn), or sample fewer at once"
            ) from error
        with ours, theirs:
            for end in (ours, theirs):
                end.setblocking(True)  # whatever socket.setdefaulttimeout was told
            for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, way, struct.pack("ll", _MESSAGE_SECONDS, 0))
            with suppress(ConnectionError):  # it died: is_gone
                message = _REQUEST.pack(b"s", number)
                socket.send_fds(self._socket, [message], [theirs.fileno()])
            return Connection(ours.detach())

    def end(self, number: int) -> None:
        """End that process, and what it has started."""
        with suppress(ConnectionError):
            self._socket.sendall(_REQUEST.pack(b"e", number))

    def notices(self) -> list[tuple[int, int | str]]:
        """Processes that ended by themselves: (number, exit code or why there was none)."""
        found = []
        with suppress(EOFError, OSError, GarbledReply):  # it died: is_gone
            while self.connection.poll(0):
                number, how = plain_tuple(self.connection.recv_bytes(1 << 20))
                found.append((number, how))
        return found

    @property
    def is_gone(self) -> bool:
        """Whether it has died, and with it all its forks."""
        return self._child.is_gone

    def close(self) -> None:
        """End it and all its forks."""
        self._socket.close()
        self._child.end()


def serve(fd: int, parent: int) -> None:
    """The process's own end: load the tools, then fork until the trainer is gone."""
    connection = begin(fd, parent, "tools")
    import numpy  # noqa: F401 - a tool that imports it late draws from a generator that is seeded

    try:
        loaded = load(pickle.loads(connection.recv_bytes()))
    except EOFError:
        return
    except ToolError as error:
        connection.send_bytes(pickle.dumps(("refused", str(error))))
        return
    connection.send_bytes(pickle.dumps(("ready",)))
    _allow_more_files()
    gc.collect()
    gc.freeze()  # pages of what is loaded stay shared
    _Forks(connection, parent, loaded).run()


@dataclass(slots=True)
class _Fork:
    """output: the end of a pipe for what it prints. line: what of that is no whole line yet. shown:
    bytes. is_silent: it has closed the pipe. is_wanted: nobody has asked for its end."""

    pid: int
    output: int
    line: bytearray = field(default_factory=bytearray)
    shown: int = 0
    is_silent: bool = False
    is_wanted: bool = True


class _Forks:
    def __init__(self, connection: Connection, parent: int, loaded: Loaded):
        self._connection = connection
        self._control = _socket_of(connection)
        self._notices: deque[tuple[int, int | str]] = deque()
        self._own, self._parent = os.getpid(), parent
        self._loaded = loaded
        self._forks: dict[int, _Fork] = {}
        self._shown = 0
        self._wake, wake = socket.socketpair()
        self._wake.setblocking(False)
        wake.setblocking(False)
        self._waker = wake
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        signal.signal(signal.SIGCHLD, _nothing)
        signal.signal(signal.SIGTERM, _nothing)
        signal.set_wakeup_fd(wake.fileno())
        # Not by SIGKILL any more: there is something to end before. Orphans of forks come here.
        die_with(parent, signal.SIGTERM)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def run(self) -> None:
        while os.getppid() == self._parent:
            selected = self._selector.select(timeout=1.0)
            ready = {key.fileobj for key, what in selected if what & selectors.EVENT_READ}
            writable = {key.fileobj for key, what in selected if what & selectors.EVENT_WRITE}
            for fork in self._forks.values():
                if fork.output in ready:
                    self._show(fork)
            with suppress(BlockingIOError):
                self._wake.recv(4096)
            self._reap()
            if self._control in ready and not self._obey():
                break
            if self._notices and self._control in writable:
                self._tell_one()
        self._end_all()

    def _obey(self) -> bool:
        """Do what the trainer says; False where it says no more."""
        try:
            message, handles, _, _ = socket.recv_fds(self._control, _REQUEST.size, 1)
        except ConnectionError:
            return False
        if len(message) < _REQUEST.size:
            return False
        kind, number = _REQUEST.unpack(message)
        if kind == b"s":
            self._start(number, handles)
        elif number in self._forks:
            self._forks[number].is_wanted = False
            _kill(self._forks[number].pid)
        return True

    def _start(self, number: int, handles: list[int]) -> None:
        if not handles:  # the system had none left for us
            self._tell(number, "it could not be started: too many open files")
            return
        (handle,) = handles
        pid = output = -1
        try:
            output, theirs = os.pipe()
            try:
                pid = os.fork()
                if pid == 0:
                    self._act(handle, theirs, output)
            finally:
                os.close(theirs)
        except OSError as error:
            if output >= 0:
                os.close(output)
            self._tell(number, f"it could not be started: {reason(error)}")
            return
        finally:
            os.close(handle)
        os.set_blocking(output, False)
        self._forks[number] = _Fork(pid, output)
        self._selector.register(output, selectors.EVENT_READ)

    def _act(self, handle: int, stdout: int, output: int) -> None:
        """In the fork. Does not return."""
        code = 1
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            die_with(self._own, signal.SIGKILL)
            os.dup2(stdout, 1)
            os.dup2(stdout, 2)
            for mine in (stdout, output, *(fork.output for fork in self._forks.values())):
                os.close(mine)
            self._selector.close()
            for nurserys in (self._connection, self._control, self._wake, self._waker):
                nurserys.close()
            os.set_inheritable(handle, False)
            act(Answers(Connection(handle)), self._loaded)
            code = 0
        except OSError:  # the tool closed our pipe
            pass
        except Exception:  # noqa: BLE001 - the fork of a loop must not go on in it
            traceback.print_exc()
        finally:
            os._exit(code)

    def _reap(self) -> None:
        """Say which forks have ended, and kill what they leave in their sessions."""
        ended: dict[int, int] = {}
        with suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                ended[found[0]] = os.waitstatus_to_exitcode(found[1])
        for number, fork in list(self._forks.items()):
            if fork.pid in ended:
                _kill_group(fork.pid)
                if not fork.is_silent:
                    self._show(fork, last=True)
                if not fork.is_silent:
                    self._selector.unregister(fork.output)
                os.close(fork.output)
                del self._forks[number]
                if fork.is_wanted:
                    self._tell(number, ended[fork.pid])

    def _tell(self, number: int, how: int | str) -> None:
        """Later: the trainer may be busy, and must find us listening all the same."""
        self._notices.append((number, how))
        self._selector.modify(self._control, selectors.EVENT_READ | selectors.EVENT_WRITE)

    def _tell_one(self) -> None:
        with suppress(ConnectionError):
            self._connection.send_bytes(pickle.dumps(self._notices.popleft()))
        if not self._notices:
            self._selector.modify(self._control, selectors.EVENT_READ)

    def _show(self, fork: _Fork, *, last: bool = False) -> None:
        """Whole lines of what it has printed, until it has been too much."""
        text = b""
        with suppress(BlockingIOError):
            text = os.read(fork.output, 1 << 16)  # all that a pipe holds
            if not text:  # it has closed its end, which would be ready for ever
                self._selector.unregister(fork.output)
                fork.is_silent = last = True
        fork.line += text
        end = (
            len(fork.line) if last or len(fork.line) > SHOWN_OF_ONE else fork.line.rfind(b"\n") + 1
        )
        lines, fork.line = fork.line[:end], fork.line[end:]
        if fork.shown > SHOWN_OF_ONE or self._shown > SHOWN_OF_ALL:
            return
        fork.shown += len(lines)
        self._shown += len(lines)
        if fork.shown > SHOWN_OF_ONE or self._shown > SHOWN_OF_ALL:
            lines = lines[:SHOWN_OF_ONE] + b"\n[more that tools printed is not shown]\n"
        with suppress(OSError):  # a terminal that is closed
            os.write(2, lines)

    def _end_all(self) -> None:
        for fork in self._forks.values():
            _kill(fork.pid)
        # Then what they have started in sessions of its own, down to the last generation.
        end = time.monotonic() + _ENDING_SECONDS
        while time.monotonic() < end:
            for pid in _children():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _socket_of(connection: Connection) -> socket.socket:
    """The same under another descriptor, for descriptors to be sent over."""
    made = socket.socket(fileno=os.dup(connection.fileno()))
    made.setblocking(True)  # whatever socket.setdefaulttimeout was told
    return made


def _allow_more_files() -> None:
    """As many as this process may have: environments take one each."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _kill(pid: int) -> None:
    """A process that has not been waited for, and its session."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # it may not have its session yet
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone; macOS says it the second way
        os.killpg(pid, signal.SIGKILL)


def _children() -> list[int]:
    with suppress(OSError):  # systems without it
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    return []


def _nothing(*_: object) -> None:
    """A signal handler that only has Python write to the wakeup descriptor."""
