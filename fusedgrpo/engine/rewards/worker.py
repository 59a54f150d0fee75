"""A reward function in a process of its own, which a deadline can kill.

The function runs in the child's main thread (so ``signal.alarm`` works) and session (so that
Ctrl-C reaches the trainer only, and what the function starts is killed with it). The child ends
when the trainer closes the pipe and, on Linux, whenever the trainer dies. It is no sandbox.
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle

from fusedgrpo.engine.child_process import (
    Answers,
    ChildProcess,
    GarbledReply,
    Requests,
    begin,
)
from fusedgrpo.engine.rewards.call import Batch, CallFailed, Reply
from fusedgrpo.engine.rewards.spec import Source, load
from fusedgrpo.errors import RewardError
from fusedgrpo.search_path import library_first


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
        self.takes_environments: bool | None = False
        self._check_interrupt = check_interrupt
        self._job = self._packed((source, dict(kwargs)), "reward_kwargs")
        # What lies beside a file is nearer to it than what lies in the other folders.
        own = [os.path.dirname(source.target)] if source.kind == "file" else []
        self._path = library_first(sys.path, [*own, *map(str, folders)])
        self._timeout = timeout
        self._spawn()

    def _spawn(self) -> None:
        self._child = ChildProcess(__name__, self._path)
        self._requests = Requests(self._child.connection, [Reply])
        self._send(self._job)

    def ready(self) -> None:
        """Wait until the function is loaded. Raises :class:`RewardError` if it cannot be."""
        try:
            self.name, self.takes_environments = self._receive("loading it")
        except CallFailed as failure:
            raise RewardError(f"reward function {self.name!r}: {failure}") from failure

    def start(self, batch: Batch) -> None:
        """Hand over a batch; :meth:`finish` waits for what the function makes of it."""
        if self._busy or self._child.is_gone:  # interrupted, killed or died
            self._child.kill()
            self._spawn()
            self.ready()
        payload = replace(batch, trainer_state=_plain_state(batch.trainer_state))
        try:
            # Environments may be of classes that only their values tell of.
            pickler = pickle if batch.environments is None else cloudpickle
            message = pickler.dumps(payload)
        except Exception:
            for name, values in batch.columns.items():  # which of them is it?
                self._packed(values, f"data column {name!r}")
            raise
        self._send(message)

    def over(self) -> bool:
        """Whether ``finish`` has nothing to wait for."""
        child = self._child
        return child.is_gone or child.connection.poll(0) or time.monotonic() >= self._deadline

    def finish(self) -> Reply:
        """Raises :class:`CallFailed` if the function raised, hung or took its process down."""
        return self._receive("scoring a batch")

    def close(self) -> None:
        """End the child: an idle one by itself, a busy one by force."""
        if self._busy:
            self._child.kill()
        self._child.end()

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
        self._requests.send(message)

    def _receive(self, doing: str) -> Any:
        """The answer to the last request. One that is late, to a request before it, is dropped."""
        answer = None
        while answer is None:
            try:
                self._child.wait(self._deadline, self._check_interrupt)
                answer = self._requests.receive()
            except TimeoutError:
                raise CallFailed(
                    f"{doing} took more than {self._timeout:g} seconds (reward_timeout), and its "
                    "process was killed",
                    repeatable=False,
                ) from None
            except EOFError:
                how = self._child.how_it_died()
                raise CallFailed(f"its process died {doing}: {how}", repeatable=False) from None
            except GarbledReply as error:
                self._child.kill()
                raise CallFailed(
                    f"{doing}, its process wrote something else than its rewards to the trainer's "
                    "pipe",
                    repeatable=False,
                ) from error
        self._busy = False
        kind, *content = answer
        if kind == "refused":
            raise RewardError(*content)
        if kind == "failed":
            raise CallFailed(content[0], details=content[1])
        return content[0]


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
    answers = Answers(begin(fd, parent, "reward-worker"))
    loop = asyncio.new_event_loop()  # one for all batches: async clients are tied to their loop

    def receive() -> Any:
        return _unpacked(answers.receive())

    try:
        source, kwargs = receive()
        call = load(source, kwargs)
        call.interrupts = lambda: False  # no Ctrl-C comes here
    except EOFError:
        return
    except RewardError as error:
        answers.send("refused", str(error))
        return
    answers.send("ready", (call.name, call.takes("environments")))
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
            answers.send("refused", str(error))
        except CallFailed as failure:
            answers.send("failed", str(failure), failure.details)
        else:
            answers.send("reply", reply)


def _unpacked(message: bytes) -> Any:
    try:
        return pickle.loads(message)
    except Exception as error:  # a class that is not importable here, or fails to unpickle
        raise RewardError(
            f"a value cannot be rebuilt in the reward worker: {type(error).__name__}: {error}. "
            "Pass the function itself to GRPOTrainer instead of its name"
        ) from error
