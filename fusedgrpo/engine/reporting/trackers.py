"""Experiment trackers (TensorBoard, W&B, ...) beside ``metrics.jsonl``, through accelerate.

They are a courtesy: the local file is the truth, and no tracker's failure may end a run.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fusedgrpo.engine.callbacks import Callback
from fusedgrpo.engine.reporting.metrics_log import Row, finite
from fusedgrpo.errors import ConfigError, did_you_mean, reason

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("fusedgrpo")

PROJECT = "fusedgrpo"
# What accelerate calls ``run_name`` is the project of these: the variable that names it, and under
# which name they take the run's.
_PROJECTS = {
    "wandb": ("WANDB_PROJECT", "name"),
    "trackio": ("TRACKIO_PROJECT", "name"),
    "swanlab": ("SWANLAB_PROJ_NAME", "experiment_name"),
    "mlflow": ("MLFLOW_EXPERIMENT_NAME", "run_name"),
    "comet_ml": ("COMET_PROJECT_NAME", ""),
}
# The variable that names the run, where the tracker does not read it itself.
_RUN_NAMES = {"wandb": "WANDB_NAME"}


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


def _arguments(
    name: str, run_name: str, project: str | None = None, named: bool = True
) -> tuple[list[str], dict[str, str]]:
    """How the project and the run are said to a tracker class of accelerate: as they were given,
    else as its environment variables say."""
    if not named:
        run_name = os.environ.get(_RUN_NAMES.get(name, ""), run_name)
    if name in _PROJECTS:
        variable, run = _PROJECTS[name]
        return [project or os.environ.get(variable, PROJECT)], ({run: run_name} if run else {})
    if name == "clearml":
        project = project or os.environ.get("CLEARML_PROJECT", PROJECT)
        return [run_name], {"project_name": project}
    # The name of a directory under ours, and not the way to another.
    return [re.sub(r"[/\\]", "-", run_name)[:200].strip(". ") or "run"], {}


class Trackers(Callback):
    """The trackers of one run. One that fails is dropped with one warning.

    report_to: see :func:`tracker_classes`.
    run_name: name of the run; where it was not ``named`` by anybody, the tracker's environment
    variable goes before.
    project: that of the run; None for the one that the tracker's environment variable names, or
    "fusedgrpo". MLFLOW_EXPERIMENT_NAME goes before either.
    more: keyword arguments of a tracker, by its name; those that are None are left out.
    directory: where trackers that write files put them.
    config: stored with the run as its hyper-parameters.

    Raises:
        ConfigError: see :func:`tracker_classes`.
    """

    def __init__(
        self,
        report_to: str | Iterable[str] | None,
        *,
        run_name: str,
        directory: str | Path,
        config: Mapping[str, Any],
        project: str | None = None,
        named: bool = True,
        more: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
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
                arguments, keywords = _arguments(name, run_name, project, named)
                if tracker_class.requires_logging_directory:
                    Path(directory).mkdir(parents=True, exist_ok=True)
                    arguments.append(str(directory))
                own = {k: v for k, v in more.get(name, {}).items() if v is not None}
                tracker = tracker_class(*arguments, **keywords, **own)
                self._trackers[name] = tracker
                tracker.start()
                tracker.store_init_configuration(settings)
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
