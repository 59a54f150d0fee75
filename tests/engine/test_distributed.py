"""Runs in two processes are the runs of one, and end in order when one of them does not."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import process_runs
import pytest
import tiny
import torch
import yaml
from patience import HUNG
from process_runs import PROMPTS, RUNS, make

from fusedgrpo.engine import checkpointing
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.engine.distributed import Processes
from fusedgrpo.engine.reporting.drift_log import read_drift
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.reporting.run_record import newest_session, read_facts
from fusedgrpo.errors import CheckpointError, ConfigError
from fusedgrpo.models.micro_batches import shares

LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
]  # fmt: skip
SCORED = ("before", "after", "reference")
CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*LAUNCH, process_runs.__file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=HUNG)


def rows(directory: Path) -> list[dict]:
    """Metrics without what depends on the clock, and the tokens of a prompt that was cut."""
    return [
        {
            name: value
            for name, value in row.items()
            if not name.startswith(CLOCK) and name != "num_forwarded_tokens"
        }
        for row in read_metrics(directory / "metrics.jsonl")
    ]


def assert_same_rows(got: Path, want: Path) -> None:
    assert len(rows(got)) == len(rows(want)) > 0
    for ours, theirs in zip(rows(got), rows(want), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True)


def assert_same_drift(got: Path, want: Path) -> None:
    ours, theirs = read_drift(got / "drift"), read_drift(want / "drift")
    assert list(ours) == list(theirs) and len(ours) > 1
    for step in ours:
        for record, wanted in zip(ours[step], theirs[step], strict=True):
            assert record.keys() == wanted.keys()
            for name, value in wanted.items():
                found = record[name]
                if isinstance(value, list) and name in SCORED:  # None: of no token of the policy's
                    found, value = (
                        [math.nan if each is None else each for each in values]
                        for values in (found, value)
                    )
                close = isinstance(value, float) or (isinstance(value, list) and name in SCORED)
                expected = pytest.approx(value, rel=1e-4, abs=1e-4, nan_ok=True) if close else value
                assert found == expected, (step, name)


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output of ``process_runs.run_all`` in two processes."""
    directory = tmp_path_factory.mktemp("two")
    cut = make(directory / "from_one", **RUNS["a window with kl"])
    step = cut.learner.step

    def until_three(samples, number):
        if number == 3:
            raise Stop
        return step(samples, number)

    cut.learner.step = until_three
    with pytest.raises(Stop):
        cut.train()
    done = launch(directory)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 2 processes" in done.stdout
    (directory / "said.txt").write_text(done.stdout)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_run_of_one(two, tmp_path, name):
    alone = make(tmp_path / "one", **RUNS[name])
    alone.train()
    tolerance = {"rel": 1e-5, "abs": 1e-6}
    if alone.policy.precision == "bfloat16":  # in other micro-batches products round otherwise
        tolerance = {"rel": 4 * 2**-8, "abs": 1e-4}
    for pair in zip(rows(two / name), rows(tmp_path / "one"), strict=True):
        if alone.policy.precision == "bfloat16":  # a sum of such roundings and nothing else
            for row in pair:
                assert row.pop("sampling/sampling_logp_difference/max") < 8 * 2**-8
                assert row.pop("sampling/sampling_logp_difference/mean") < 2**-8
        assert pair[0] == pytest.approx(pair[1], **tolerance, nan_ok=True)
    assert any(row["grad_norm"] > 0 for row in rows(two / name))
    if alone.policy.precision == "float32":
        assert_same_drift(two / name, tmp_path / "one")
    saved = [torch.load(two / name / f"weights{rank}.pt") for rank in (0, 1)]
    for key, value in alone.policy.trainable():
        assert torch.equal(saved[0][key], saved[1][key]), f"{key} differs between the processes"
        torch.testing.assert_close(
            saved[0][key], value.detach(), rtol=tolerance["rel"], atol=tolerance["abs"]
        )


@pytest.mark.slow
def test_checkpoints_do_not_care_how_many_processes_there_were(two, tmp_path):
    options = RUNS["a window with kl"]
    make(tmp_path / "whole", **options).train()
    assert_same_rows(two / "from_one", tmp_path / "whole")

    shutil.copytree(two / "saved", tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "checkpoints" / "step-000004")
    make(tmp_path / "saved", **options).train(resume_from_checkpoint=True)
    assert_same_rows(tmp_path / "saved", tmp_path / "whole")


def test_a_step_that_depends_on_the_number_of_processes_is_not_resumed_by_another(tmp_path):
    """Saved by one process with 4 completions each; two would take 8."""
    saved = make(tmp_path / "run", per_device_train_batch_size=4, save_strategy="steps")
    saved.train()
    path = checkpointing.save(
        tmp_path / "checkpoints",
        saved.state_dict(),
        lambda path: checkpointing.save_weights(saved.policy, saved.processing_class, path),
    )
    again = make(tmp_path / "again", per_device_train_batch_size=4)
    again.args = saved.args
    again._restore(path)
    again.plan = resolve_batch(again.args, len(PROMPTS), 2)
    with pytest.raises(CheckpointError, match=r"\[1, 1\] -> \[2, 2\].*prompts_per_step"):
        again._restore(path)


@pytest.mark.slow
def test_what_a_callback_asks_for_in_one_process_happens_in_both(two):
    assert [row["step"] for row in rows(two / "stopped")] == [1, 2]
    assert list(read_drift(two / "stopped/drift")) == [1, 2]
    session = newest_session(read_facts(two / "stopped/run.json"))
    assert (session["how"], session["last_step"]) == ("finished", 2)
    assert session["machine"]["processes"] == 2


@pytest.mark.slow  # the runs of the other tests
def test_only_the_first_process_pushes_and_none_waits_for_a_hub_that_refuses(two):
    assert not (two / "hub1.txt").exists()
    asked = [
        f"create {name}\n" * 2 + f"upload {name} adapter Training in progress, step 1\n"
        f"create {name}\nupload {name} adapter End of training\n"
        for name in ("taken", "refused")
    ]
    assert (two / "hub0.txt").read_text() == "".join(asked)
    said = (two / "said.txt").read_text()
    assert said.count("Pushed: done") == 1 and said.count("and was not pushed") == 1
    for name in ("taken", "refused"):
        assert [row["step"] for row in rows(two / name)] == [1]


@pytest.mark.slow
def test_a_failure_in_one_process_ends_both(tmp_path):
    done = launch(tmp_path / "run", "fails")
    assert done.returncode != 0
    assert "no reward here" in done.stderr
    assert "ProcessError: Process 1 of 2 failed: RewardError" in done.stderr
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.slow
def test_the_command_line_under_a_launcher_saves_when_it_is_stopped(tmp_path):
    tiny.save(tmp_path / "model", tiny.model("Llama"))
    (tmp_path / "reward.py").write_text(
        "def reward(completion_ids, **kwargs):\n    return [len(set(i)) for i in completion_ids]\n"
    )
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "run"),
                "dataset": str(tmp_path / "data.jsonl"), "reward_funcs": "reward.py:reward",
                "max_steps": 5000, "num_generations": 4, "prompts_per_step": 2,
                "max_completion_length": 4,
                "lora_r": 4, "logging_steps": 1, "save_strategy": "no",
            }
        )
    )  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    command = [*LAUNCH, "-m", "fusedgrpo.cli", "train", str(tmp_path / "config.yaml")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        assert run.stdout is not None
        said = ""
        for line in run.stdout:
            said += line
            if re.match(r"step +3/", line):
                run.send_signal(signal.SIGTERM)
                break
        said += run.communicate(timeout=HUNG)[0]
    assert run.returncode != 0
    assert "Stopped by SIGTERM" in said, said
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1
    assert not (tmp_path / "run" / "run.lock").exists()


def test_shares_cover_everything_once_and_weigh_about_the_same():
    pairs = [((1,) * 8, (2,) * n) for n in (30, 10, 10, 10)] + [((3,) * 8, (2,) * 5)] * 4
    for count in (1, 2, 3, 5, 11):
        cut = shares(pairs, count)
        assert [i for own in cut for i in own] == list(range(len(pairs)))
        assert len(cut) == count
    first, second = shares(pairs, 2)
    assert (first, second) == (range(0, 2), range(2, 8))
    assert shares([], 3) == [range(0)] * 3


def test_every_process_has_its_part_and_zero_the_seed_of_a_lone_one():
    parts = [Processes(rank, 3).share(7) for rank in range(3)]
    assert [i for part in parts for i in part] == list(range(7))
    seeds = {Processes(rank, 3).derive(1, "x") for rank in range(3)}
    assert len(seeds) == 3
    assert Processes().derive(1, "x") in seeds


@pytest.mark.parametrize("key", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launcher_that_shards_is_refused_with_the_alternative(monkeypatch, key):
    monkeypatch.setenv(key, "true")
    with pytest.raises(ConfigError, match="FusedGRPOTrainer"):
        Processes.start(use_cpu=True)


class Gathered(Processes):
    """Process 0 of two, the other of which answers ``theirs``."""

    def __init__(self, theirs: object):
        super().__init__(0, 2)
        self.theirs = theirs

    def gather(self, value):
        return [value, self.theirs]


def test_what_differs_between_processes_is_refused():
    Gathered({"seed": 1}).check_equal({"seed": 1})
    with pytest.raises(ConfigError, match="seed is 2 in process 1 and 1 in process 0"):
        Gathered({"seed": 2}).check_equal({"seed": 1})
    model = tiny.model()
    sums = {
        n: repr(p.detach().sum(dtype=torch.float64).item()) for n, p in model.named_parameters()
    }
    Gathered(sums).check_equal_weights(model)
    name = "model.norm.weight"
    with pytest.raises(ValueError, match=f"Process 1 has another {name} than process 0"):
        Gathered(sums | {name: "0.0"}).check_equal_weights(model)


def test_gradients_are_summed_over_those_that_have_one(monkeypatch):
    """Process 1 has 10 everywhere but in the last parameter; process 0 lacks the second."""
    parameters = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(4)]
    for index in (0, 2):
        parameters[index].grad = torch.full((3, 2), float(index + 1))

    def all_reduce(tensor, op=None):
        if op is torch.distributed.ReduceOp.MAX:
            return tensor.copy_(torch.tensor([1, 1, 1, 0]))
        return tensor.add_(10)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    Processes(0, 2).all_reduce_gradients(parameters)
    got = [None if p.grad is None else p.grad.unique().tolist() for p in parameters]
    assert got == [[11.0], [10.0], [13.0], None]
    assert parameters[0].grad.shape == (3, 2)


def test_a_process_without_work_is_not_asked_for_rewards():
    """One prompt in two processes: the second never calls the reward function."""
    from fusedgrpo.engine.rewards import RewardBatch
    from fusedgrpo.engine.rollout.types import Completion, Group, Rollout
    from fusedgrpo.engine.scoring import score_rollout

    class Second(Processes):
        def __init__(self) -> None:
            super().__init__(1, 2)

        def gather(self, value):
            first = RewardBatch(torch.ones(2, 1), torch.ones(2), {"f": 1.0}, {"a": [1, 2]}, {}, 0)
            return [([first], None), value]

    functions = types.SimpleNamespace(names=["f"])  # without a ``score``
    rollout = Rollout((Group(0, (5,), (Completion((6,), "x", "stop"),) * 2),))
    batch = RewardBatch.joined(score_rollout(
        functions, rollout, [None], conversational=False, column_names=[], state=None, seed=0,
        processes=Second(),
    ))  # fmt: skip
    assert batch.values.tolist() == [[1.0], [1.0]]
    assert batch.extra == {"a": [1, 2]}
