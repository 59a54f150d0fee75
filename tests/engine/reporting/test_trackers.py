from __future__ import annotations

from typing import Any, ClassVar

import pytest
from accelerate import tracking

from fusedgrpo.engine.reporting.trackers import Trackers, tracker_classes
from fusedgrpo.errors import ConfigError


class Recorder(tracking.GeneralTracker):
    """Keeps what it is given; ``fails_in`` names the methods that raise."""

    name = "recorder"
    requires_logging_directory = True
    fails_in: ClassVar[set[str]] = set()
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, run_name: str, logging_dir: str):
        self.tracker = None
        super().__init__()

    def _note(self, method: str, *values: Any) -> None:
        if method in self.fails_in:
            raise ConnectionError("the network is gone")
        self.calls.append((method, *values))

    def start(self) -> None:
        self._note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("config", values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self._note("log", step, values)

    def finish(self) -> None:
        self._note("finish")


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "fails_in", set())
    monkeypatch.setattr(Recorder, "calls", [])


def open_trackers(tmp_path, report_to="recorder"):
    return Trackers(
        report_to, run_name="run", directory=tmp_path, config={"lr": 0.1, "funcs": ["a"]}
    )


@pytest.mark.parametrize("nothing", [None, "none", "", [], ["none"]])
def test_none_reports_nowhere(tmp_path, nothing):
    trackers = open_trackers(tmp_path, nothing)
    trackers.on_step({"step": 1, "loss": 0.0})
    trackers.close()
    assert Recorder.calls == []


def test_a_tracker_gets_config_finite_values_and_the_end(tmp_path):
    trackers = open_trackers(tmp_path)
    trackers.on_step({"step": 3, "loss": 0.5, "kl": float("nan"), "reward": None})
    trackers.close()
    assert Recorder.calls == [
        ("start",),
        ("config", {"lr": 0.1, "funcs": "['a']"}),
        ("log", 3, {"loss": 0.5}),
        ("finish",),
    ]


def test_the_first_evaluation_is_a_row_of_its_own_and_later_ones_are_in_theirs(tmp_path):
    trackers = open_trackers(tmp_path)
    trackers.on_evaluate(0, {"eval_reward": 0.25})
    trackers.on_evaluate(2, {"eval_reward": 0.5})
    trackers.close()
    assert [call for call in Recorder.calls if call[0] == "log"] == [
        ("log", 0, {"eval_reward": 0.25})
    ]


@pytest.mark.parametrize("method", ["start", "config", "log", "finish"])
def test_a_failing_tracker_gives_one_warning_and_is_dropped(tmp_path, caplog, method):
    Recorder.fails_in.add(method)
    trackers = open_trackers(tmp_path)
    for step in range(3):
        trackers.on_step({"step": step, "loss": 0.5})
    trackers.close()
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "fusedgrpo"]
    assert "'recorder' failed (ConnectionError: the network is gone)" in warning
    assert ("finish",) not in Recorder.calls


def test_an_unknown_tracker_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"no tracker 'tensorbord'.*Did you mean 'tensorboard'"):
        tracker_classes("tensorbord")


def test_every_missing_package_is_named_before_the_run(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError) as caught:
        tracker_classes("wandb, comet_ml")
    assert len(caught.value.problems) == 2
    assert "pip install wandb" in caught.value.problems[0]
    assert "pip install comet-ml" in caught.value.problems[1]


def test_all_means_what_is_installed(monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb", "tensorboard"])
    assert list(tracker_classes("all")) == ["tensorboard", "wandb"]


@pytest.mark.parametrize(
    ("name", "variable", "given"),
    [
        ("wandb", "WANDB_PROJECT", (("mine",), {"name": "a/../b"})),
        ("trackio", "TRACKIO_PROJECT", (("mine",), {"name": "a/../b", "space_id": "mine"})),
        ("swanlab", "SWANLAB_PROJ_NAME", (("mine",), {"experiment_name": "a/../b"})),
        ("mlflow", "MLFLOW_EXPERIMENT_NAME", (("mine",), {"run_name": "a/../b"})),
        ("comet_ml", "COMET_PROJECT_NAME", (("mine",), {})),
        ("clearml", "CLEARML_PROJECT", (("a/../b",), {"project_name": "mine"})),
        ("recorder", "", (("a-..-b", "DIRECTORY"), {})),
    ],
)
def test_a_run_is_a_run_of_a_project_and_no_way_out_of_its_directory(
    name, variable, given, tmp_path, monkeypatch
):
    calls = []

    class Named(Recorder):
        requires_logging_directory = name == "recorder"

        def __init__(self, *arguments: Any, **named: Any):
            calls.append((tuple(a.replace(str(tmp_path), "DIRECTORY") for a in arguments), named))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, Named)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [name])
    for project in ("mine", None):
        if variable and project:
            monkeypatch.setenv(variable, project)
        elif variable:
            monkeypatch.delenv(variable)
        more = {"trackio": {"space_id": project}}
        Trackers(name, run_name="a/../b", directory=tmp_path, config={}, more=more).close()
    assert calls[0] == given
    given[1].pop("space_id", None)
    assert calls[1] == eval(repr(given).replace("mine", "fusedgrpo"))
    # What was given goes before; the run's name, where nobody gave one, comes after.
    monkeypatch.setenv(variable or "UNUSED", "another")
    monkeypatch.setenv("WANDB_NAME", "theirs")
    again: Any = {"run_name": "a/../b", "directory": tmp_path, "config": {}, "project": "mine"}
    Trackers(name, **again).close()
    Trackers(name, **again, named=False).close()
    assert calls[2] == given
    run = "theirs" if name == "wandb" else "a/../b"
    assert calls[3] == eval(repr(given).replace("a/../b", run))
