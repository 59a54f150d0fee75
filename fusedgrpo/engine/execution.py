"""How the work of a run is carried out, as against what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.interrupts import StopSignals
from fusedgrpo.engine.memory.oom_retry import OOMRetry


@dataclass(slots=True)
class Execution:
    """oom_retry: how much is done at once, and again where memory ran out. processes: who does
    which share. signals: what may interrupt it. No result depends on any of them."""

    oom_retry: OOMRetry
    processes: Processes = field(default_factory=Processes)
    signals: StopSignals = field(default_factory=StopSignals)

    def check_interrupt(self) -> None:
        """Raise ``Interrupted`` if a signal has come: called between pieces of long work."""
        self.signals.check()
