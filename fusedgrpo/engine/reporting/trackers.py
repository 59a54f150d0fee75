"""Experiment trackers (TensorBoard, W&B, ...) beside ``metrics.jsonl``, through accelerate.

They are a courtesy: the local file is the truth, and no tracker's failure may end a run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fusedgrpo.engine.callbacks import Callback
from fusedgrpo.engine.reporting.metrics_log import Row, finite
from fusedgrpo.errors import ConfigError, did_you_mean, reason

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("fusedgrpo")

PROJECT = "fusedgrpo"


class _Names(NamedTuple):
    """How a tracker is told of the project and the run. project: the variables that name the
    project, which accelerate calls ``run_name``. run, run_variables: the keyword that takes the
    run's name, and the variables that name it. directory: the keyword that takes the place of its
    files."""

    project: tuple[str, ...]
    run: str = ""
    run_variables: tuple[str, ...] = ()
    directory: str = ""


_NAMES = {
    "wandb": _Names(("WANDB_PROJECT",), "name", ("WANDB_NAME",), "dir"),
    "trackio": _Names(("TRACKIO_PROJECT",), "name"),
    "swanlab": _Names(
        ("SWANLAB_PROJ_NAME", "SWANLAB_PROJECT_NAME"),
        "experiment_name",
        ("SWANLAB_EXP_NAME", "SWANLAB_EXPERIMENT_NAME"),
        "logdir",
    ),
    "mlflow": _Names(("MLFLOW_EXPERIMENT_NAME",), "run_name"),
    "comet_ml": _Names(("COMET_PROJECT_NAME",)),
    "clearml": _Names(("CLEARML_PROJECT",), "task_name", ("CLEARML_TASK",)),
}


def tracker_classes(report_to: str | Iterable[str] | None) -> dict[str, type[GeneralTracker]]:
    """Name -> tracker class for ``report_to``: names, a comma list, ``"all"`` or ``"none"``.

    Raises:
        ConfigError: a name accelerate does not know, or whose package is not installed.
    """
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to or ())
    names = [name.strip().lower() for name in names]
    names = [name for name in names if name not in ("", "none")]
    if not names:
        return {}

    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    installed = {str(name) for name in get_available_trackers()}
    if "all" in names:
        names = [name for name in names if name != "all"] + sorted(installed)
    checked = {str(name) for name in LoggerType}  # trackers that users register are not in here
    problems = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            hint = did_you_mean(name, LOGGER_TYPE_TO_CLASS)
            problems.append(f"report_to: no tracker {name!r}.{hint} There are: {known}, all, none.")
        elif name in checked and name not in installed:
            package = {"comet_ml": "comet-ml"}.get(name, name)
            problems.append(
                f"report_to: {name!r} is not installed. `pip install {package}`, or leave it out: "
                "metrics.jsonl is written in any case."
            )
    if problems:
        raise ConfigError(problems)
    return {name: LOGGER_TYPE_TO_CLASS[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run is kept in its trackers.

    run_name: name of the run; where it was not ``named`` by anybody, the tracker's environment
    variable goes before. project: that of the run; None for the one that the tracker's environment
    variable names, or "fusedgrpo". directory: where trackers write that need to be told;
    logging_dir: what the user says instead, which is for those as well that have a place of their
    own. steps: behind a run that goes on. more: keyword arguments of a tracker, by its name; those
    that are None are left out.
    """

    run_name: str
    directory: Path
    named: bool = True
    project: str | None = None
    logging_dir: Path | None = None
    steps: int = 0
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def opened(self, name: str, tracker_class: type[GeneralTracker]) -> GeneralTracker:
        """The tracker of that name, with this project and run; not started."""
        if name not in _NAMES:
            return self._opened_in_directory(name, tracker_class)
        names = _NAMES[name]
        run_name = (not self.named and _said(names.run_variables)) or self.run_name
        project = self.project or _said(names.project) or PROJECT
        own = self.more.get(name, {})
        keywords = {key: value for key, value in own.items() if value is not None}
        if names.run:
            keywords[names.run] = run_name
        if names.directory and self.logging_dir is not None:
            self.logging_dir.mkdir(parents=True, exist_ok=True)
            keywords[names.directory] = str(self.logging_dir)
        if name == "clearml":
            return tracker_class(run_name, project_name=project, **keywords)
        tracker: Any = tracker_class(project, **keywords)
        if name == "mlflow":
            tracker.experiment_name = project  # its class lets the variable go before
        return tracker

    def _opened_in_directory(
        self, name: str, tracker_class: type[GeneralTracker]
    ) -> GeneralTracker:
        # The name of a directory under ours, and not the way to another.
        arguments = [re.sub(r"[/\\]", "-", self.run_name)[:200].strip(". ") or "run"]
        keywords: dict[str, Any] = {}
        directory = self.logging_dir or self.directory
        if name == "tensorboard":
            if self.logging_dir is None and (said := _said(("TENSORBOARD_LOGGING_DIR",))):
                directory = Path(said).expanduser()
            if self.steps:
                # Of steps that are done again, it shows the new ones.
                keywords["purge_step"] = self.steps + 1
        if tracker_class.requires_logging_directory:
            directory.mkdir(parents=True, exist_ok=True)
            arguments.append(str(directory))
        return tracker_class(*arguments, **keywords)


def _said(variables: Iterable[str]) -> str | None:
    return next((value for name in variables if (value := os.environ.get(name))), None)


def _not_kept_yet(name: str, tracker: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` as the tracker takes them: a run of MLflow that goes on (MLFLOW_RUN_ID) keeps
    those that it began with and refuses others."""
    kept = tracker.tracker.data.params if name == "mlflow" else {}
    return {key: value for key, value in settings.items() if key not in kept}


class Trackers(Callback):
    """The trackers of one run. One that fails is dropped with one warning.

    report_to: see :func:`tracker_classes`.
    place: project, name and directory of the run.
    config: stored with the run as its hyper-parameters.

    Raises:
        ConfigError: see :func:`tracker_classes`.
    """

    def __init__(
        self,
        report_to: str | Iterable[str] | None,
        place: Place,
        config: Mapping[str, Any],
    ):
        classes = tracker_classes(report_to)
        self._trackers: dict[str, GeneralTracker] = {}
        if not classes:
            return

        from accelerate import PartialState

        PartialState()  # accelerate's trackers log through it
        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in config.items()
        }
        for name, tracker_class in classes.items():
            try:
                tracker = self._trackers[name] = place.opened(name, tracker_class)
                tracker.start()
                tracker.store_init_configuration(_not_kept_yet(name, tracker, settings))
            except Exception as error:  # noqa: BLE001 - not logged in, no network, full disk, ...
                self._drop(name, error)

    def on_evaluate(self, step: int, metrics: Row) -> None:
        """The evaluation before the first step; later ones are in their step's row."""
        if step == 0:
            self.on_step({"step": 0, **metrics})

    def on_step(self, row: Row) -> None:
        """Hand the finite numbers of one row of metrics to every tracker that still works."""
        values = {key: v for key in row if key != "step" and (v := finite(row[key])) is not None}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(values, step=int(row["step"]))
            except Exception as error:  # noqa: BLE001 - whatever their client raises
                self._drop(name, error)

    def close(self) -> None:
        """Let the trackers write what they still hold. May be called twice."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001 - whatever their client raises
                self._drop(name, error)
        self._trackers.clear()

    def _drop(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        logger.warning(
            "Tracker %r failed (%s) and is left out from now on; metrics.jsonl has all rows.",
            name,
            reason(error),
        )
