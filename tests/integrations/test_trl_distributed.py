"""FusedGRPOTrainer in two processes, weights whole or sharded: the numbers of stock TRL and of one
process."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from patience import HUNG

pytest.importorskip("trl")
pytestmark = [pytest.mark.peer, pytest.mark.slow]

from accelerate.commands.config.config_args import load_config_from_file  # noqa: E402
from accelerate.commands.launch import launch_command_parser  # noqa: E402

from fusedgrpo.errors import ConfigError  # noqa: E402
from fusedgrpo.integrations.trl import FusedGRPOTrainer  # noqa: E402

SCRIPT = Path(__file__).with_name("trl_processes.py")
_spec = importlib.util.spec_from_file_location("trl_processes", SCRIPT)
assert _spec is not None and _spec.loader is not None
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

FUSED = [name for name in processes.STEPS if not name.endswith("-trl")]


def launch(out: Path, *arguments: str, **environment: str) -> Path:
    """Two processes of the script, in the environment that a user's launch would have."""
    tiny.model("Llama", scale=6.0).save_pretrained(out / "model")
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(SCRIPT), str(out), *arguments],
        env={**os.environ, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=HUNG)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends the two processes as well
        said, _ = process.communicate(timeout=HUNG)
        pytest.fail(f"two processes wait for each other: {said[-6000:]}")
    assert process.returncode == 0, said[-8000:]
    return out


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    return launch(tmp_path_factory.mktemp("zero3"), "zero3", DS_ACCELERATOR="cpu")


def left(out: Path, name: str) -> Any:
    return torch.load(out / f"{name}.pt", weights_only=True)


def assert_same_gradients(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    flat = [torch.cat([g.flatten() for g in gs.values()]) for gs in (got, want)]
    error = (flat[0] - flat[1]).norm() / flat[1].norm()
    assert error <= 1e-5, f"gradient off by {error:.1e}"


def stock(out: Path, name: str, rank: int) -> dict[str, Any]:
    return left(out, f"ddp-{name.split('-')[0]}-trl-{rank}")


def assert_same_steps(got: dict[str, Any], want: dict[str, Any]) -> None:
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-6, atol=1e-6)
    assert_same_gradients(got["gradients"], want["gradients"])
    assert_same_metrics(got["metrics"], want["metrics"])


def assert_same_metrics(got: dict[str, list[float]], want: dict[str, list[float]]) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name] == pytest.approx(values, rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("name", FUSED)
def test_two_processes_compute_what_stock_trl_computes_in_two(out, name):
    for rank in range(2):
        assert_same_steps(left(out, f"ddp-{name}-{rank}"), stock(out, name, rank))


@pytest.mark.parametrize("name", FUSED)
def test_two_processes_compute_what_one_computes_with_all_rows(out, name):
    cls, options = processes.STEPS[name]
    one = processes.step(cls, out, **options)
    two = [left(out, f"ddp-{name}-{rank}") for rank in range(2)]
    loss = torch.stack([each["loss"] for each in two]).mean()
    torch.testing.assert_close(loss, one["loss"], rtol=1e-6, atol=1e-6)
    for each in two:  # DDP has averaged them
        assert_same_gradients(each["gradients"], one["gradients"])
        assert_same_metrics(each["metrics"], one["metrics"])


@pytest.mark.parametrize("name", FUSED)
def test_ddp_sees_one_forward_whatever_the_rows_of_a_process_need(out, name):
    for rank in range(2):
        assert left(out, f"ddp-{name}-{rank}")["forwards"] == [True]


@pytest.mark.parametrize("kind", ["fused", "fused_loss"])
@pytest.mark.parametrize("name", processes.RUNS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_seeded_runs_in_two_processes_log_what_stock_trl_logs(out, strategy, name, kind):
    logs = [left(out, f"{strategy}-{name}-{which}-0") for which in ("trl", kind)]
    assert len(logs[0]) == 4  # three steps and the summary
    for want, got in itertools.zip_longest(*logs):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-5)


def test_two_processes_that_share_groups_sample_different_completions(out):
    one, two = (left(out, f"ddp-rollouts-{rank}") for rank in range(2))
    assert [len(ids) for ids in one["said"]] == [8] * 3
    assert all(mine != others for mine, others in zip(one["said"], two["said"], strict=True))
    for row, mine, others in zip(one["log"], one["said"], two["said"], strict=False):
        lengths = [len(ids) for ids in mine + others]
        assert row["completions/mean_length"] == pytest.approx(sum(lengths) / 16)
    assert one["weights"].keys() == two["weights"].keys()
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])


@pytest.mark.parametrize("name", processes.SHARDED)
def test_weights_sharded_by_fsdp2_give_the_same_steps_with_equally_many_forwards(out, name):
    for rank in range(2):
        fused = left(out, f"fsdp2-{name}-{rank}")
        assert_same_steps(fused, stock(out, name, rank))
        assert fused["forwards"] == [False, True]  # the question about the layout, then all rows


@pytest.mark.parametrize("name", processes.SHARDED)
def test_weights_sharded_by_zero3_give_the_same_steps_with_equally_many_forwards(out, zero3, name):
    for rank in range(2):
        fused = left(zero3, f"zero3-{name}-{rank}")
        assert_same_steps(fused, stock(out, name, rank))
        assert fused["forwards"] == [False, True]


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_blocks_and_root_sharded_give_the_log_probs_and_gradients_of_the_whole_model(out, adapter):
    want = processes.plainly_sharded(adapter, shard=False)
    for rank in range(2):
        got = left(out, f"plain-{adapter}-{rank}")
        assert got["layout"] == want["layout"] == "shared"
        for name in ("logp", "entropy"):
            torch.testing.assert_close(got[name][0], want[name][rank], rtol=1e-6, atol=1e-6)
        assert_same_gradients(got["gradients"], want["gradients"])


def test_fsdp2_under_bfloat16_does_not_round_log_probs_to_16_bit(out):
    logps = left(out, "fsdp2-bf16-0")
    assert logps.dtype == torch.float32
    scored = logps[logps != 0]
    assert (scored.bfloat16() != scored).float().mean() > 0.9


def test_tokens_per_microbatch_is_refused_where_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(FusedGRPOTrainer, "_sharded", True)
    with pytest.raises(ConfigError, match="tokens_per_microbatch=64 with sharded weights"):
        processes.make(FusedGRPOTrainer, tmp_path, tokens_per_microbatch=64)


@pytest.mark.parametrize(
    "name, meaning",
    [
        ("ddp", {"multi_gpu": True, "use_fsdp": False, "use_deepspeed": False}),
        ("fsdp2", {"use_fsdp": True, "fsdp_version": 2, "fsdp_reshard_after_forward": True}),
        ("zero3", {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_accelerate_reads_the_config_files_of_the_docs(name, meaning):
    arguments = vars(processes.launch_arguments(name))
    assert {key: arguments[key] for key in meaning} == meaning
    assert arguments["num_processes"] == 2 and arguments["mixed_precision"] == "bf16"
    # accelerate takes a key that it does not know without a word.
    known = {action.dest for action in launch_command_parser()._actions}
    config = load_config_from_file(arguments["config_file"])
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
