"""SIGINT and SIGTERM end a run in order: state saved, exit code 130 or 143."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class Interrupted(SystemExit):
    """Raised by ``StopSignals.check``; ``code`` is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopSignals:
    """Catches the signals while it is entered, in the main thread; elsewhere it does nothing.

    The first signal is noted and raised by the next ``check``, at a point where the state is whole.
    The second one does what it would have done without us, unless it comes within ``echo_seconds``
    of the first. A signal that is ignored (nohup) stays ignored.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, echo_seconds: float = 0.0) -> None:
        self.received: int | None = None
        self._echo_ends = 0.0
        self._echo_seconds = echo_seconds
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raise ``Interrupted`` if a signal has come."""
        if self.received is not None:
            raise Interrupted(self.received)

    def __enter__(self) -> StopSignals:
        self.received = None
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
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            self._echo_ends = time.monotonic() + self._echo_seconds
            if not self._echo_seconds:
                self._restore()
        elif time.monotonic() > self._echo_ends:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
