"""Trackers for real, without a network: three runs by the command line, read back from the files
and by the packages that wrote them. Of those that are installed; docs/trackers.md has the command.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from patience import HUNG

from fusedgrpo.engine.reporting.metrics_log import finite, read_metrics

pytestmark = [pytest.mark.peer, pytest.mark.slow]  # three runs, and imports of seconds


class Kept(NamedTuple):
    """A run as a tracker has it. rows: step -> name -> value."""

    project: str
    name: str
    settings: dict[str, Any]
    rows: dict[int, dict[str, float]]


def tensorboard(place: Path) -> Iterator[Kept]:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    read = EventMultiplexer().AddRunsFromDirectory(str(place / "files"))
    read.Reload()
    settings: dict[str, dict[str, Any]] = {}
    for run in read.Runs():
        metadata = read.GetAccumulator(run).summary_metadata.get("_hparams_/session_start_info")
        if metadata is not None:
            data = HParamsPluginData.FromString(metadata.plugin_data.content)
            found = {
                key: getattr(value, str(value.WhichOneof("kind")))
                for key, value in data.session_start_info.hparams.items()
            }
            settings.setdefault(run.split("/")[0], found)
    for run, tags in read.Runs().items():
        rows: dict[int, dict[str, float]] = {}
        for name in tags["scalars"]:
            for event in read.Scalars(run, name):
                assert name not in rows.setdefault(event.step, {}), "a step is there twice"
                rows[event.step][name] = event.value
        if rows:
            yield Kept("", run, settings[run], rows)


def mlflow(place: Path) -> Iterator[Kept]:
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(f"sqlite:///{place}/mlflow.db")
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            rows: dict[int, dict[str, float]] = {}
            for name in run.data.metrics:
                for value in client.get_metric_history(run.info.run_id, name):
                    rows.setdefault(value.step, {})[name] = value.value
            assert run.info.status == "FINISHED"
            yield Kept(experiment.name, run.info.run_name, run.data.params, rows)


def trackio(place: Path) -> Iterator[Kept]:
    script = (
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage as storage\n"
        "print(json.dumps([[project, run.name, run.config,\n"
        "  storage.get_logs(project, run.name, run_id=run.id)]\n"
        "  for project in storage.get_projects() for run in trackio.Api().runs(project)]))"
    )  # in a process of its own: where its files are is read as it is imported
    said = subprocess.check_output([sys.executable, "-c", script], env=environment(place))
    for project, name, settings, logs in json.loads(said.splitlines()[-1]):
        rows = {log.pop("step"): log for log in logs}
        for log in rows.values():
            del log["timestamp"]
        yield Kept(project, name, settings, rows)


def records(file: Path, header: int = 7, block: int = 32768) -> Iterator[bytes]:
    """The records of a log in the format of LevelDB, behind a header."""
    data, at, parts = file.read_bytes(), header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb(place: Path) -> Iterator[Kept]:
    from wandb.proto.wandb_internal_pb2 import Record

    for file in place.rglob("*.wandb"):
        of: Any = None
        settings: dict[str, Any] = {}
        rows: dict[int, dict[str, float]] = {}
        for raw in records(file):
            record = Record.FromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                of = record.run
            for item in (*record.config.update, *record.run.config.update):
                settings[item.key] = json.loads(item.value_json)
            if kind == "history":
                items = record.history.item
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                step = row.pop("_step")
                rows[step] = {name: v for name, v in row.items() if not name.startswith("_")}
        yield Kept(of.project, of.display_name, settings, rows)


def swanlab(place: Path) -> Iterator[Kept]:
    import yaml
    from swanlab.proto.swanlab.metric.column.v1.column_pb2 import COLUMN_CLASS_CUSTOM
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    for file in place.rglob("*.swanlab"):
        of: Any = None
        rows: dict[int, dict[str, float]] = {}
        ours: set[str] = set()  # not what it measures of the machine
        for raw in records(file):
            record = Record.FromString(raw)
            kind = record.WhichOneof("record_type")
            if kind == "start":
                of = record.start
            if kind == "column" and record.column.column_class == COLUMN_CLASS_CUSTOM:
                ours.add(record.column.column_key)
            if kind == "scalar":
                found = record.scalar
                rows.setdefault(found.step, {})[found.key] = found.value.number
        settings = yaml.safe_load((file.parent / "files" / "config.yaml").read_text())
        values = {name: entry["value"] for name, entry in settings.items()}
        rows = {step: {k: v for k, v in row.items() if k in ours} for step, row in rows.items()}
        yield Kept(of.project, of.name, values, {step: row for step, row in rows.items() if row})


READERS: dict[str, Callable[[Path], Iterator[Kept]]] = {
    reader.__name__: reader for reader in (tensorboard, mlflow, trackio, wandb, swanlab)
}
INSTALLED = [name for name in READERS if importlib.util.find_spec(name)]


def environment(place: Path) -> dict[str, str]:
    trackers = tuple(name.upper() for name in READERS)
    own = {name: value for name, value in os.environ.items() if not name.startswith(trackers)}
    return own | {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{place}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": str(place / "trackio"), "DO_NOT_TRACK": "1",
        "TENSORBOARD_LOGGING_DIR": str(place / "files"),
        "WANDB_PROJECT": "theirs", "MLFLOW_EXPERIMENT_NAME": "theirs",
        "TRACKIO_PROJECT": "theirs", "SWANLAB_PROJ_NAME": "theirs",
        "WANDB_NAME": "called", "SWANLAB_EXP_NAME": "called",
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs: ``first`` as the variables say; it again from its second step on; and ``second``
    as its options say."""
    folder = tmp_path_factory.mktemp("trackers")
    tiny.save(folder / "model", tiny.model("Llama"))
    (folder / "data.jsonl").write_text('{"prompt": "w5 w9"}\n{"prompt": "w6 w7"}\n')
    (folder / "reward.py").write_text(
        "def odd(completion_ids, **kwargs):\n"
        "    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    common = [
        "train", "--model_name_or_path", "model", "--dataset", "data.jsonl", "--eval_dataset",
        "data.jsonl", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_on_start",
        "--reward_funcs", "reward.py:odd", "--num_generations", "2", "--prompts_per_step", "2",
        "--max_completion_length", "4", "--max_steps", "3", "--save_steps", "2", "--use_cpu",
        "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", ",".join(INSTALLED),
    ]  # fmt: skip
    first = [*common, "--output_dir", "first"]
    again = [*first, "--resume_from_checkpoint", "first/checkpoints/step-000002"]
    second = [*common, "--output_dir", "second", "--project", "mine", "--run_name", "ours"]
    second += ["--logging_dir", "files"]
    script = (
        "import json, sys\nfrom fusedgrpo.cli import app\n"
        "for words in json.loads(sys.argv[1]):\n    app(words, standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps([first, again, second])],
        cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=HUNG,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout
    return folder


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_has_every_run_where_it_was_to_be(name: str, request: Any) -> None:
    pytest.importorskip(name)
    place: Path = request.getfixturevalue("place")
    kept = list(READERS[name](place))
    called = "called" if name in ("wandb", "swanlab") else "first"
    bare = name == "tensorboard"  # has no projects
    first = [run for run in kept if (run.project, run.name) == ("" if bare else "theirs", called)]
    (second,) = (r for r in kept if (r.project, r.name) == ("" if bare else "mine", "ours"))
    truth = {
        run: {
            row["step"]: {k: v for k in row if k != "step" and (v := finite(row[k])) is not None}
            for row in read_metrics(place / run / "metrics.jsonl")
        }
        for run in ("first", "second")
    }
    assert sorted(second.rows) == [0, 1, 2, 3]
    compare(second, truth["second"])
    # A run that goes on is a second one of that name, but for TensorBoard.
    assert len(kept) == (2 if bare else 3)
    steps = [[0, 1, 2, 3]] if bare else [[0, 1, 2, 3], [3]]
    assert sorted(sorted(run.rows) for run in first) == steps
    latest = min(first, key=lambda run: len(run.rows))
    compare(latest, {step: truth["first"][step] for step in latest.rows})
    for run, directory in (*((run, "first") for run in first), (second, "second")):
        assert run.settings["output_dir"] == directory
        assert float(run.settings["learning_rate"]) > 0
        assert run.settings["reward_funcs"] == "['reward.py:odd']"


def compare(run: Kept, truth: dict[int, dict[str, float]]) -> None:
    for step, row in run.rows.items():
        assert row == pytest.approx(truth[step], rel=1e-6, abs=1e-9), step
