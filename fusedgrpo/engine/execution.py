"""How the work of a run is carried out, as against what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.memory.oom_retry import OOMRetry

# Called after each token: how many came, and how many completions are in flight and waiting. What
# is on a device is read when it is shown, for that has to wait for the device.
Count = int | Tensor
Report = Callable[[Count, Count, int], None]
# Entered around a rollout, for its ``Report``.
Progress = Callable[[], AbstractContextManager[Report]]


@contextmanager
def unwatched() -> Iterator[Report]:
    """The progress of a rollout where nobody is to see it."""
    yield lambda tokens, live, waiting: None


@dataclass(slots=True)
class Execution:
    """oom_retry: how much is done at once, and again where memory ran out. processes: who does
    which share. signals: what may interrupt it. progress: entered around each rollout, for what is
    to be told of it. No result depends on any of them."""

    oom_retry: OOMRetry
    processes: Processes = field(default_factory=Processes)
    signals: StopSignals = field(default_factory=StopSignals)
    progress: Progress = unwatched

    def check_interrupt(self) -> None:
        """Raise ``Interrupted`` if a signal has come: called between pieces of long work."""
        self.signals.check()

    @contextmanager
    def watched(self, progress: Progress) -> Iterator[None]:
        """Inside, rollouts tell ``progress`` how far they are."""
        before, self.progress = self.progress, progress
        try:
            yield
        finally:
            self.progress = before
