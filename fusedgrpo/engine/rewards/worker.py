"""A reward function in a process of its own, which a deadline can kill.

The function runs in the child's main thread (so ``signal.alarm`` works) and session (so that
Ctrl-C reaches the trainer only, and what the function starts is killed with it). The child ends
when the trainer closes the pipe and, on Linux, whenever the trainer dies. It is no sandbox.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fusedgrpo
from fusedgrpo.engine.rewards.call import Batch, CallFailed, Reply
from fusedgrpo.engine.rewards.spec import Source, load
from fusedgrpo.errors import RewardError
from fusedgrpo.search_path import library_first

GRACE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1

# The child sees the trainer's modules, whatever its own path would be, and this very fusedgrpo,
# wherever on that path another one is.
_BOOT = """
import sys
fd, parent, package, *sys.path = sys.argv[1:]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("fusedgrpo", package)
sys.modules["fusedgrpo"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["fusedgrpo"])
from fusedgrpo.engine.rewards.worker import serve
serve(int(fd), int(parent))
"""

# Every message begins with the number of the request that it is, or answers.
_NUMBER_BYTES = 8
# Of an answer. A line of text that something has printed into the pipe announces more than this.
_LARGEST_REPLY = 1 << 28


class Worker:
    """The trainer's end. ``start`` a batch, then ``finish`` it; a dead child is replaced.

    folders: searched for modules after all of the trainer's. timeout: seconds for one call, and for
    loading the function; None for no limit. check_interrupt: called while it is waited for, and
    may raise.
    """

    def __init__(
        self,
        source: Source,
        kwargs: Mapping[str, Any],
        *,
        folders: Sequence[Path],
        timeout: float | None,
        check_interrupt: Callable[[], None] = lambda: None,
    ):
        self.name = source.text
        self._check_interrupt = check_interrupt
        self._job = self._packed((source, dict(kwargs)), "reward_kwargs")
        self._number = 0
        # What lies beside a file is nearer to it than what lies in the other folders.
        own = [os.path.dirname(source.target)] if source.kind == "file" else []
        self._path = library_first(sys.path, [*own, *map(str, folders)])
        self._timeout = timeout
        self._spawn()

    def _spawn(self) -> None:
        self._connection, theirs = Pipe()
        package = os.path.abspath(str(fusedgrpo.__file__))
        arguments = [str(theirs.fileno()), str(os.getpid()), package, *self._path]
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", _BOOT, *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self._process, self._connection, os.getpid())
        self._send(self._job)

    def ready(self) -> None:
        """Wait until the function is loaded. Raises :class:`RewardError` if it cannot be."""
        try:
            self.name = self._receive("loading it")
        except CallFailed as failure:
            raise RewardError(f"reward function {self.name!r}: {failure}") from failure

    def start(self, batch: Batch) -> None:
        """Hand over a batch; :meth:`finish` waits for what the function makes of it."""
        if self._busy or self._process.poll() is not None:  # interrupted, killed or died
            self._kill()
            self._spawn()
            self.ready()
        payload = replace(batch, trainer_state=_plain_state(batch.trainer_state))
        try:
            message = pickle.dumps(payload)
        except Exception:
            for name, values in batch.columns.items():  # which of them is it?
                self._packed(values, f"data column {name!r}")
            raise
        self._send(message)

    def finish(self) -> Reply:
        """Raises :class:`CallFailed` if the function raised, hung or took its process down."""
        return self._receive("scoring a batch")

    def close(self) -> None:
        """End the child: an idle one by itself, a busy one by force."""
        if self._busy:
            self._kill()
        self._end()

    def _kill(self) -> None:
        if self._end.alive:  # else its id may be somebody else's by now
            _kill_session(self._process)
        self._end()

    def _packed(self, value: Any, what: str) -> bytes:
        try:
            return pickle.dumps(value)
        except Exception as error:  # pickle raises what the values' own classes raise
            raise RewardError(
                f"reward function {self.name!r} runs in a worker process, to which {what} cannot "
                f"be sent ({error}). Pass the function itself to GRPOTrainer instead of its name: "
                "then it runs in the trainer's process"
            ) from error

    def _send(self, message: bytes) -> None:
        self._busy = True
        self._deadline = math.inf if self._timeout is None else time.monotonic() + self._timeout
        self._number += 1
        with suppress(OSError):  # it died: _receive says how
            self._connection.send_bytes(_numbered(self._number, message))

    def _receive(self, doing: str) -> Any:
        """The answer to the last request. One that is late, to a request before it, is dropped."""
        while True:
            self._wait(doing)
            try:
                message = self._connection.recv_bytes(_LARGEST_REPLY)
            except (EOFError, OSError):
                raise self._died(doing) from None
            number = int.from_bytes(message[:_NUMBER_BYTES], "big")
            if len(message) < _NUMBER_BYTES or number > self._number:
                raise self._garbled(doing)
            if number == self._number:
                break
        try:
            kind, *content = _ReplyUnpickler(io.BytesIO(message[_NUMBER_BYTES:])).load()
        except Exception as error:  # bytes that are no pickle raise anything
            raise self._garbled(doing) from error
        self._busy = False
        if kind == "refused":
            raise RewardError(*content)
        if kind == "failed":
            raise CallFailed(content[0], details=content[1])
        return content[0]

    def _wait(self, doing: str) -> None:
        """Until there is something to read. Raises :class:`CallFailed` at the deadline."""
        while not self._connection.poll(max(0.0, min(0.5, self._deadline - time.monotonic()))):
            try:
                self._check_interrupt()
            except BaseException:
                self._kill()
                raise
            # What the function started may hold the pipe open after the child is gone.
            if self._process.poll() is not None and not self._connection.poll(0):
                raise self._died(doing)
            if time.monotonic() >= self._deadline:
                self._kill()
                raise CallFailed(
                    f"{doing} took more than {self._timeout:g} seconds (reward_timeout), and its "
                    "process was killed",
                    repeatable=False,
                )

    def _garbled(self, doing: str) -> CallFailed:
        self._kill()
        return CallFailed(
            f"{doing}, its process wrote something else than its rewards to the trainer's pipe",
            repeatable=False,
        )

    def _died(self, doing: str) -> CallFailed:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_SECONDS)
        code = self._process.poll()
        self._kill()
        if code is not None and code < 0:
            how = f"signal {-code} ({signal.strsignal(-code)})"
            how += ", as when memory runs out" if code == -signal.SIGKILL else ""
        elif code is None:
            how = "it closed the trainer's pipe, or wrote into it"
        else:
            how = f"exit code {code}"
        return CallFailed(f"its process died {doing}: {how}", repeatable=False)


class _ReplyUnpickler(pickle.Unpickler):
    """A reply is plain values: nothing that a worker sends is run in the trainer."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (Reply.__module__, Reply.__qualname__):
            return Reply
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a reply")


def _numbered(number: int, message: bytes) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "big") + message


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # gone; macOS says it the second way
        os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], connection: Connection, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer: the child is not its to end
        return
    connection.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    _kill_session(process)
    process.wait()


def _plain_state(state: Any) -> SimpleNamespace | None:
    """The scalars of a trainer state: its class need not be importable where the worker is."""
    if state is None:
        return None
    if isinstance(state, Mapping):
        items = dict(state)
    elif is_dataclass(state):
        items = {f.name: getattr(state, f.name) for f in fields(state)}
    else:
        items = vars(state)
    scalars = (str, int, float, bool, type(None))
    return SimpleNamespace(**{k: v for k, v in items.items() if isinstance(v, scalars)})


def serve(fd: int, parent: int) -> None:
    """The child's end: load the function, then answer batches until the pipe closes."""
    _die_with(parent)
    os.set_inheritable(fd, False)
    sys.argv = ["reward-worker"]
    connection = Connection(fd)
    loop = asyncio.new_event_loop()  # one for all batches: async clients are tied to their loop

    own, number = os.getpid(), 0

    def receive() -> Any:
        nonlocal number
        message = connection.recv_bytes()
        number = int.from_bytes(message[:_NUMBER_BYTES], "big")
        return _unpacked(message[_NUMBER_BYTES:])

    def send(*message: Any) -> None:
        if os.getpid() != own:
            os._exit(0)  # the function forked and returned twice: one of them answers
        connection.send_bytes(_numbered(number, pickle.dumps(message)))

    try:
        source, kwargs = receive()
        call = load(source, kwargs)
        call.interrupts = lambda: False  # no Ctrl-C comes here
    except EOFError:
        return
    except RewardError as error:
        send("refused", str(error))
        return
    send("ready", call.name)
    while True:
        try:
            batch = receive()
            if call.is_async:
                reply = loop.run_until_complete(call.call_async(batch))
            else:
                reply = call(batch)
        except EOFError:
            return
        except RewardError as error:
            send("refused", str(error))
        except CallFailed as failure:
            send("failed", str(failure), failure.details)
        else:
            send("reply", reply)


def _unpacked(message: bytes) -> Any:
    try:
        return pickle.loads(message)
    except Exception as error:  # a class that is not importable here, or fails to unpickle
        raise RewardError(
            f"a value cannot be rebuilt in the reward worker: {type(error).__name__}: {error}. "
            "Pass the function itself to GRPOTrainer instead of its name"
        ) from error


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
