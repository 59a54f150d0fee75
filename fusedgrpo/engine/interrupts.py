"""SIGINT, SIGTERM and SIGHUP end a run in order: state saved, exit code 130, 143 or 129."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interrupted(SystemExit):
    """Raised by ``StopSignals``; ``code`` is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name
        self.said = False  # whether the user has been told what became of the run


class StopSignals:
    """Catches the signals while it is entered, in the main thread; elsewhere it does nothing.

    The first signal is noted and raised by the next ``check``, at a point where the state is whole,
    or at once inside ``at_once``. The second one does what it would have done without us, unless it
    comes within ``echo_seconds`` of the first; inside ``held`` it waits. A signal that is ignored
    (nohup) stays ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, echo_seconds: float = 0.0) -> None:
        self.received: int | None = None
        self._echo_ends = 0.0
        self._echo_seconds = echo_seconds
        self._before: dict[int, Any] = {}
        self._held = 0
        self._waiting: int | None = None
        self._at_once = 0

    @property
    def none_came(self) -> bool:
        """Whether the signals are caught and there was none: a KeyboardInterrupt is no Ctrl-C."""
        return bool(self._before) and self.received is None

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, the first signal is raised where it comes: for work that changes no state, may
        take long and is not ours to poll in, such as a reward function."""
        self._at_once += 1
        try:
            self.check()  # one that came before has nobody else to look at it for a long time
            yield
        finally:
            self._at_once -= 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no signal raises anything: for changes that must be done whole or not at all."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if not self._held and self._waiting is not None:
                number, self._waiting = self._waiting, None
                self._let_through(number)

    def __enter__(self) -> StopSignals:
        self.received = self._waiting = None
        self._held = self._at_once = 0
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.received = None
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            self._echo_ends = time.monotonic() + self._echo_seconds
            if self._at_once and not self._held:
                raise Interrupted(number)
        elif self._echo_seconds and time.monotonic() <= self._echo_ends:
            pass  # the launcher's copy of the first one
        elif self._held:
            self._waiting = number
        else:
            self._let_through(number)

    def _let_through(self, number: int) -> None:
        self._restore()
        outer = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(outer, StopSignals):  # the command line's: to it this would be the first
            outer._let_through(number)
        else:
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
