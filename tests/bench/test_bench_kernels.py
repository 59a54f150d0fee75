"""The benches of the kernels: equal work for all contenders, and the scripts as users run them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from patience import HUNG
from torch.utils.flop_counter import FlopCounterMode

from fusedgrpo.kernels import launch
from fusedgrpo.kernels.reference import reference_linear_logprob

BENCH = Path(__file__).parents[2] / "bench"
PEERS = ("trl", "liger_kernel", "cut_cross_entropy")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(BENCH.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(BENCH / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=HUNG,
    )


def check(file: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run a bench; the rows it wrote."""
    result = run(*arguments, "--quick", "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    text = file.read_text()
    assert socket.gethostname() not in text and str(Path.home()) not in text
    return [json.loads(line) for line in text.splitlines()]


def float32_problem(accuracy: ModuleType, heads: ModuleType, B: int | None = None) -> Any:
    x = accuracy.make("peaked", 24, 64, 512, "cpu")
    advantages = x.advantages if B is None else x.advantages[:B]
    hidden = x.hidden.detach().float().requires_grad_()
    return heads.Problem(hidden, x.weight.float(), x.targets, advantages)


def test_the_truth_of_accuracy_is_that_of_the_kernels(load: Any) -> None:
    accuracy, heads = load("bench_accuracy"), load("head_contenders")
    problem = float32_problem(accuracy, heads)
    hidden = problem.hidden.detach().double().requires_grad_()
    expected, _ = reference_linear_logprob(hidden, problem.weight.double(), problem.targets)
    expected.backward(problem.coefficient.double())
    logp, gradient = accuracy.truth(problem, rows_at_once=7)
    torch.testing.assert_close(logp, expected.detach())
    torch.testing.assert_close(gradient, hidden.grad)


@pytest.mark.parametrize("B", [None, 4], ids=["one token each", "six tokens each"])
def test_ours_and_torch_do_the_same_work(load: Any, B: int | None) -> None:
    accuracy, heads = load("bench_accuracy"), load("head_contenders")
    problem = float32_problem(accuracy, heads, B)
    truth = accuracy.truth(problem)
    for contender in (*heads.ours(), heads.plain_torch()):
        errors = accuracy.measure(contender, problem, *truth)
        assert max(errors["grad"], errors.get("logp_max", 0)) < 1e-4, contender.name


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("B", [None, 4], ids=["one token each", "six tokens each"])
def test_peers_do_the_same_work(load: Any, B: int | None) -> None:
    accuracy, heads = load("bench_accuracy"), load("head_contenders")
    problem = float32_problem(accuracy, heads, B)
    truth = accuracy.truth(problem)
    peers = heads.peers([name for name in PEERS if importlib.util.find_spec(name)], "cpu")
    if not peers:
        pytest.skip("no peer is installed")
    for peer in peers:
        errors = accuracy.measure(peer, problem, *truth)
        assert max(errors["grad"], errors["logp_max"]) < 1e-4, peer.name


@pytest.mark.parametrize("error", [math.nan, 2e-5])
def test_a_missed_bar_is_told_of_ours_only(load: Any, error: float) -> None:
    accuracy = load("bench_accuracy")
    fine = dict.fromkeys(accuracy.UNITS, 0.0)
    bad = fine | {"logp_max": error}
    assert not accuracy.misses({("flat", "fusedgrpo"): fine, ("flat", "trl"): bad})
    (missed,) = accuracy.misses({("flat", "fusedgrpo (GPU arithmetic)"): bad})
    assert "logp_max" in missed


@pytest.mark.parametrize(
    ("metric", "ours", "worse"),
    [
        ("logp_max", 4.9e-6, False),
        ("logp_max", 5.1e-6, True),
        ("grad", 1.005e-6, False),
        ("grad", 1.02e-6, True),
        ("grad_worst_row", math.nan, True),
    ],
)
def test_a_tie_is_no_loss_and_nan_is(load: Any, metric: str, ours: float, worse: bool) -> None:
    accuracy = load("bench_accuracy")
    assert accuracy.is_worse(metric, ours, dict.fromkeys(accuracy.UNITS, 1e-6)) == worse


@pytest.mark.parametrize("units", [1, 2, 3])
def test_the_bound_is_exactly_the_necessary_work(load: Any, units: int) -> None:
    bench, heads = load("bench_linear_logprob"), load("head_contenders")
    N, H, V = 1030, 8, 4100  # tiles that are not full
    problem = heads.Problem(
        torch.randn(N, H), torch.randn(V, H), torch.zeros(N, dtype=torch.int64), torch.ones(1)
    )
    work = bench.bare_gemms(problem, units)
    with FlopCounterMode(display=False) as counter:
        work()
    assert counter.get_total_flops() == units * 2 * N * H * V


def test_a_contender_without_memory_is_reported_and_the_others_are_measured(load: Any) -> None:
    bench, heads = load("bench_linear_logprob"), load("head_contenders")

    def starve(problem: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate too much")

    case = bench.Case(16, 8, 64, 4, "cpu", torch.float32)
    greedy = heads.Contender("greedy", starve)
    samples = bench.measure(case, "frozen", bench.make(case), [*heads.ours(), greedy], rounds=2)
    assert samples["greedy"] == {"oom": [1.0]}
    assert len(samples["fusedgrpo"]["bound"]) == len(samples["bare GEMMs"]["bound"]) == 2
    assert len(samples["fusedgrpo"]["bound/linear_policy_loss"]) == 2


def test_a_peer_that_fails_is_named_and_left_out(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = load("head_contenders")

    def fail(problem: Any) -> torch.Tensor:
        raise ImportError("no module named datasets\nand more")

    monkeypatch.setattr(heads.harness, "installed", list)
    monkeypatch.setattr(heads, "_trl", lambda: [heads.Contender("trl", fail)])
    assert heads.peers(["trl"], "cpu") == []
    assert capsys.readouterr().out == "trl: skipped, ImportError: no module named datasets\n"


def test_work_of_microseconds_is_repeated_and_the_time_is_of_one_run(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: list[float] = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: sum(clock))
    figures = load("harness").timed(lambda: clock.append(0.01), repeat=3)()
    assert len(clock) == 4 and figures["time"] == pytest.approx(0.01)


def test_only_a_lack_of_memory_is_forgiven(load: Any) -> None:
    heads = load("head_contenders")

    def fail() -> None:
        raise RuntimeError("illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        heads.out_of_memory(fail)


def test_a_tuned_name_is_replaced_where_it_is_used_and_put_back(load: Any) -> None:
    tune = load("tune")
    from fusedgrpo.kernels.logprob import vocab_pass

    original = launch.tiling
    other = launch.Tiling(8, 16, 16, 8)
    with tune.replaced("tiling", other):
        assert vocab_pass.tiling(1, 2, 4, "cpu") is other
    assert vocab_pass.tiling is launch.tiling is original


def test_tune_runs_and_ends_with_what_to_paste() -> None:
    result = run("tune.py", "--quick", "--rounds", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("    return Tiling(rows=")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tune_says_that_it_needs_a_gpu() -> None:
    result = run("tune.py")
    assert result.returncode == 1 and "there is none here" in result.stderr


@pytest.mark.slow
def test_bench_accuracy_meets_the_bars(tmp_path: Path) -> None:
    rows = check(tmp_path / "x.jsonl", "bench_accuracy.py")
    assert {row["impl"] for row in rows} == {"fusedgrpo", "torch", "torch float32"}
    assert {row["case"].split(",")[0] for row in rows} == {"flat", "peaked", "collapsed"}
    ours = {row["case"].split(", ")[-1] for row in rows if row["impl"] == "fusedgrpo"}
    functions = {"linear_logprob", "linear_policy_loss"}
    assert ours == functions | {f"{name} (GPU arithmetic)" for name in functions}


@pytest.mark.slow
def test_bench_linear_logprob_gives_no_seconds_of_a_cpu(tmp_path: Path) -> None:
    rows = check(tmp_path / "x.jsonl", "bench_linear_logprob.py", "--trainable", "--device", "cpu")
    assert {row["case"].split(",")[0] for row in rows} == {"no_grad", "frozen", "trainable"}
    assert {row["impl"] for row in rows} == {"fusedgrpo", "torch", "bare GEMMs"}
    assert not [row for row in rows if row["unit"] in ("s", "ms", "TFLOP/s")]
    assert [row for row in rows if row["metric"] == "bound/linear_policy_loss"]


@pytest.mark.slow
def test_bench_policy_loss_gives_no_seconds_of_a_cpu(tmp_path: Path) -> None:
    rows = check(tmp_path / "x.jsonl", "bench_policy_loss.py", "--device", "cpu")
    assert {row["case"].split(",")[0] for row in rows} == {"policy_loss", "group_advantages"}
    assert not [row for row in rows if row["unit"] in ("s", "ms")]


@pytest.mark.slow
@pytest.mark.peer
def test_bench_decode_meets_the_bars_and_gives_no_seconds_of_a_cpu(tmp_path: Path) -> None:
    rows = check(tmp_path / "x.jsonl", "bench_decode.py", "--device", "cpu", "--threads", "1")
    kinds = {row["case"].split(",")[0] for row in rows}
    assert kinds == {"a token each", "attention", "x W^T", "all products of a token"}
    assert {row["unit"] for row in rows} == {"nat", "share", "relative", "byte", "x fusedgrpo"}
    same = [row["value"] for row in rows if row["metric"] == "same_token"]
    assert len(same) == 4 and min(same) == 1, "the draw is that of float64"


def test_trl_computes_the_same_loss_from_given_log_probs(load: Any) -> None:
    pytest.importorskip("trl")
    bench = load("bench_policy_loss")
    batch = bench.make_batch(4, 16, "cpu")
    works = bench.loss_works(batch, ["trl"])
    errors = bench.deviations(works["trl"](), bench.loss_truth(batch))
    assert max(errors.values()) < 1e-5
