"""``run.json``: what a run is made of, and when it ran, session by session.

``sessions`` has one entry for each time that the run was started or resumed; everything else is of
the newest of them, as ``engine/run_description.py`` makes it. A session without an ``ended`` is
running, or was killed: ``RecordedRun.is_running`` knows which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from fusedgrpo.config.redaction import hide, hide_known
from fusedgrpo.engine.interrupts import Interrupted
from fusedgrpo.engine.reporting.metrics_log import to_jsonable

FORMAT = 1


class RunRecord:
    """Writes ``path``. facts: of the session that begins, beside ``sessions``."""

    def __init__(self, path: Path, facts: Mapping[str, Any]):
        self.path = path
        self.facts: dict[str, Any] = dict(facts)
        earlier = read_facts(path).get("sessions")
        self.sessions: list[Any] = earlier if isinstance(earlier, list) else []

    def begin(self, session: Mapping[str, Any]) -> None:
        """Add a session that starts now. It is not written yet."""
        self.sessions.append({"started": _now(), "ended": None, "how": None, **session})

    def end(self, how: str, last_step: int) -> None:
        """Say that the session is over, and how; of several times the last one counts."""
        self.sessions[-1] |= {"ended": _now(), "how": how, "last_step": last_step}

    def write(self) -> None:
        """The file is complete, or what it was. Raises OSError."""
        values = {"format": FORMAT, "sessions": self.sessions, **self.facts}
        text = json.dumps(_hidden(to_jsonable(values)), indent=1, allow_nan=False, default=str)
        unfinished = self.path.with_name(f".{self.path.name}.tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)


def read_facts(path: str | Path) -> dict[str, Any]:
    """The content of a ``run.json``; empty where it is not there, or torn."""
    try:
        facts = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def newest_session(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The session of a ``run.json`` that runs, or ran last; empty where there is none."""
    sessions = facts.get("sessions")
    newest = sessions[-1] if isinstance(sessions, list) and sessions else None
    return newest if isinstance(newest, dict) else {}


def ended_by(error: BaseException) -> str:
    """How a session ended that ``error`` has ended."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return "interrupted"
    return f"failed: {type(error).__name__}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _hidden(value: Any) -> Any:
    """``value`` without what looks like a secret in any of its texts."""
    if isinstance(value, Mapping):
        return {key: _hidden(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hidden(item) for item in value]
    return hide_known(hide(value)) if isinstance(value, str) else value
