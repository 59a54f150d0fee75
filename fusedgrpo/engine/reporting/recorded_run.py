"""A run as its directory has it: what reports, verdicts and comparisons are made of."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.engine.reporting.drift_log import Drift, read_drift, with_measured_kl
from fusedgrpo.engine.reporting.held_out_log import Checks, read_checks
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.reporting.run_lock import is_held
from fusedgrpo.engine.reporting.run_record import newest_session, read_facts
from fusedgrpo.errors import DataError

logger = logging.getLogger("fusedgrpo")


@dataclass(frozen=True)
class RecordedRun:
    """path: the directory, resolved. rows: of ``metrics.jsonl``, in order. config: the options,
    empty where their file is missing. checks: the most likely answers to held-out prompts, by
    step. completions: what was sampled. drift: log-probs before and after some updates, by step.
    kl_is_sampled: the ``kl`` in ``rows`` is that of ``drift``, of a few completions now and then.
    facts: of ``run.json``, empty where it is missing."""

    path: Path
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    checks: Checks
    completions: Completions
    drift: Drift = field(default_factory=dict)
    kl_is_sampled: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """Whether a process trains it now: its last session has no end, and its lock is held."""
        newest = newest_session(self.facts)
        return bool(newest) and newest.get("ended") is None and is_held(self.path)

    @classmethod
    def read(cls, path: str | Path) -> RecordedRun:
        """Raises DataError: there is no metrics.jsonl in ``path``, or no row in it."""
        path = Path(path).expanduser().resolve()
        metrics = path / "metrics.jsonl"
        rows = read_metrics(metrics) if metrics.exists() else []
        if not rows:
            raise DataError(
                f"{str(metrics)!r} has no rows: nothing to report on. Is this a run's output_dir?"
            )
        drift = read_drift(path / "drift")
        rows, kl_is_sampled = with_measured_kl(rows, drift)
        return cls(
            path=path,
            rows=rows,
            config=read_config(path / "config.resolved.yaml"),
            checks=read_checks(path / "held_out"),
            completions=Completions(path / "completions"),
            drift=drift,
            kl_is_sampled=kl_is_sampled,
            facts=read_facts(path / "run.json"),
        )


def read_config(path: Path) -> dict[str, Any]:
    """The options in a ``config.resolved.yaml``; none if it is not there, or, with a warning, if it
    is no such file."""
    import yaml

    if not path.exists():
        return {}
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        logger.warning("%s is left out: %s", path, error)
        return {}
    return {str(name): value for name, value in config.items()} if isinstance(config, dict) else {}
