from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from accelerate import tracking

from fusedgrpo.engine.reporting.trackers import Place, Trackers, tracker_classes
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
    place = Place(run_name="run", directory=tmp_path)
    return Trackers(report_to, place, {"lr": 0.1, "funcs": ["a"]})


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


def opened(name, monkeypatch, **place):
    """The arguments and attributes of the tracker that a run in ``place`` would open."""

    class Named(Recorder):
        requires_logging_directory = name in ("recorder", "tensorboard")

        def __init__(self, *arguments: Any, **named: Any):
            self.arguments = arguments, named

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [name])
    tracker: Any = Place(**place).opened(name, Named)
    return tracker


@pytest.mark.parametrize(
    ("name", "variable", "run_variable", "given"),
    [
        ("wandb", "WANDB_PROJECT", "WANDB_NAME", (("mine",), {"name": "a/../b"})),
        ("trackio", "TRACKIO_PROJECT", "", (("mine",), {"name": "a/../b"})),
        ("swanlab", "SWANLAB_PROJ_NAME", "SWANLAB_EXP_NAME",
         (("mine",), {"experiment_name": "a/../b"})),
        ("mlflow", "MLFLOW_EXPERIMENT_NAME", "", (("mine",), {"run_name": "a/../b"})),
        ("comet_ml", "COMET_PROJECT_NAME", "", (("mine",), {})),
        ("clearml", "CLEARML_PROJECT", "CLEARML_TASK",
         (("a/../b",), {"project_name": "mine", "task_name": "a/../b"})),
        ("recorder", "", "", (("a-..-b", "DIRECTORY"), {})),
    ],
)  # fmt: skip
def test_a_run_is_a_run_of_a_project_and_no_way_out_of_its_directory(
    name, variable, run_variable, given, tmp_path, monkeypatch
):
    def arguments(**place):
        tracker = opened(name, monkeypatch, directory=tmp_path, run_name="a/../b", **place)
        ours, named = tracker.arguments
        return tuple(a.replace(str(tmp_path), "DIRECTORY") for a in ours), named

    def renamed(old, new):
        return eval(repr(given).replace(old, new))

    for name_of_another in ("WANDB_PROJECT", "WANDB_NAME"):  # of the machine that tests
        monkeypatch.delenv(name_of_another, raising=False)
    monkeypatch.setenv(variable or "UNUSED", "mine")
    assert arguments() == given
    monkeypatch.delenv(variable or "UNUSED")
    assert arguments() == renamed("mine", "fusedgrpo")
    # What was given goes before the variables; the run's name, where nobody gave one, after them.
    monkeypatch.setenv(variable or "UNUSED", "another")
    monkeypatch.setenv(run_variable or "UNUSED", "theirs")
    assert arguments(project="mine") == given
    run = "theirs" if run_variable else "a/../b"
    assert arguments(project="mine", named=False) == renamed("a/../b", run)


def test_files_go_where_the_user_says(tmp_path, monkeypatch):
    ours: dict[str, Any] = {"directory": tmp_path / "ours", "run_name": "run"}
    said = tmp_path / "said"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "variable"))
    arguments = opened("tensorboard", monkeypatch, **ours).arguments
    assert arguments == (("run", str(tmp_path / "variable")), {})
    arguments = opened("tensorboard", monkeypatch, **ours, logging_dir=said, steps=4).arguments
    assert arguments == (("run", str(said)), {"purge_step": 5})
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    assert opened("tensorboard", monkeypatch, **ours).arguments[0][1] == str(tmp_path / "ours")
    for name, keyword in {"wandb": "dir", "swanlab": "logdir"}.items():
        assert keyword not in opened(name, monkeypatch, **ours).arguments[1]
        given = opened(name, monkeypatch, **ours, logging_dir=said).arguments[1]
        assert given[keyword] == str(said)


def test_mlflow_takes_the_given_project_and_keeps_what_a_run_began_with(tmp_path, monkeypatch):
    stored: list[dict[str, Any]] = []

    class MLflow(Recorder):
        """Like accelerate's: the variable goes before the argument, and a run that goes on has
        parameters, which cannot be changed."""

        requires_logging_directory = False

        def __init__(self, experiment_name: str, run_name: str):
            self.experiment_name = "the variable's"

        @property
        def tracker(self) -> Any:
            return SimpleNamespace(data=SimpleNamespace(params={"lr": "0.2"}))

        def start(self) -> None:
            stored.append({"experiment": self.experiment_name})

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            stored.append(values)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", MLflow)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["mlflow"])
    place = Place(run_name="run", directory=tmp_path, project="mine")
    Trackers("mlflow", place, {"lr": 0.1, "beta": 0.0}).close()
    assert stored == [{"experiment": "mine"}, {"beta": 0.0}]


def test_what_a_tracker_alone_is_told(tmp_path, monkeypatch):
    more = {"trackio": {"space_id": "me/board", "other": None}}
    where = {"directory": tmp_path, "run_name": "run", "project": "mine", "more": more}
    assert opened("trackio", monkeypatch, **where).arguments == (
        ("mine",),
        {"space_id": "me/board", "name": "run"},
    )
    assert opened("wandb", monkeypatch, **where).arguments == (("mine",), {"name": "run"})
