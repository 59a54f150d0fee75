"""Callables scored in the trainer's own process: sync ones in turn, async ones together."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import CancelledError, Future, wait
from contextlib import suppress

from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.rewards.call import Batch, CallFailed, Reply, RewardCall, failed

GRACE_SECONDS = 2.0


class Inline:
    """A callable, run in the calling thread when it is waited for. A signal to the run ends it
    wherever it is, for nothing of the run changes while it works."""

    def __init__(self, call: RewardCall, signals: StopSignals | None = None):
        self.name = call.name
        self.takes_environments = call.takes("environments")
        self._call = call
        self._signals = signals or StopSignals()

    def start(self, batch: Batch) -> None:
        self._batch = batch

    def finish(self) -> Reply:
        with self._signals.at_once():
            return self._call(self._batch)

    def close(self) -> None:
        pass


class EventLoop:
    """The thread in which all async callables of a run share one loop.

    One loop for the whole run, because async clients are tied to the loop of their first call;
    a thread, because the caller may have a loop running (as notebooks do).
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closing:
            # A task of a user's that exits (SystemExit, KeyboardInterrupt) stops the loop. Who
            # awaits that task is told as well, once the loop goes on.
            with suppress(SystemExit, KeyboardInterrupt):
                self._loop.run_forever()

    def submit(self, call: RewardCall, batch: Batch) -> Future[Reply]:
        return asyncio.run_coroutine_threadsafe(call.call_async(batch), self._loop)

    def close(self) -> None:
        if self._loop.is_closed() or self._closing:
            return
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GRACE_SECONDS)
        if not self._thread.is_alive():  # else a coroutine blocks it, and it ends with the process
            self._loop.close()


class Concurrent:
    """An async callable, under way while the others are scored.

    timeout: seconds for one call; None for no limit. What it awaits is cancelled then.
    """

    def __init__(
        self,
        call: RewardCall,
        loop: EventLoop,
        timeout: float | None = None,
        signals: StopSignals | None = None,
    ):
        self.name = call.name
        self.takes_environments = call.takes("environments")
        self._call = call
        self._loop = loop
        self._timeout = timeout
        self._signals = signals or StopSignals()

    def start(self, batch: Batch) -> None:
        self._started = time.monotonic()
        self._future = self._loop.submit(self._call, batch)

    def finish(self) -> Reply:
        """Raises :class:`CallFailed` if the function did, or took more than its time."""
        left = None
        if self._timeout is not None:
            left = max(0.0, self._started + self._timeout - time.monotonic())
        try:
            with self._signals.at_once():
                done, _ = wait([self._future], timeout=left)
        except BaseException:
            self._future.cancel()
            raise
        if not done:
            self._future.cancel()
            raise CallFailed(
                f"scoring a batch took more than {self._timeout:g} seconds (reward_timeout), and "
                "it was cancelled",
                repeatable=False,
            )
        try:
            return self._future.result()
        except CancelledError:
            raise CallFailed("scoring a batch was cancelled, not by the trainer") from None
        except GeneratorExit as error:  # as an answer it is the function's own
            raise failed(error) from error

    def close(self) -> None:
        self._loop.close()
