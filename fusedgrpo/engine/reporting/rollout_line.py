"""Where a run shows how far its rollouts are."""

from __future__ import annotations

from rich.console import Console

from fusedgrpo.engine.reporting.display import Display
from fusedgrpo.engine.reporting.status_line import StatusLine
from fusedgrpo.engine.reporting.terminal import overwrites
from fusedgrpo.engine.rollout.progress import RolloutProgress


def rollout_progress(display: Display) -> RolloutProgress:
    """The progress of rollouts: in the panel of ``display``, on a line of standard error where that
    is a terminal and there is no panel, else as a line of ``display`` now and then."""
    errors = Console(stderr=True)
    if not display.is_live and overwrites(errors):
        return RolloutProgress(StatusLine(errors.file).show, overwrites=True)
    return RolloutProgress(display.detail, overwrites=display.is_live)
