"""``bench_update.py``: what it gives everybody, what it says of the bars, and as a user runs it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from patience import HUNG

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_update")


def case(bench: ModuleType, shape: Any, **changes: Any) -> Any:
    given = bench.Case("m", "nowhere", shape, False, "cpu", torch.float32, 1, 4096)
    return dataclasses.replace(given, **changes)


def test_rollouts_have_the_shape_and_are_the_same_every_time(bench: ModuleType) -> None:
    shape = bench.Shape(16, 64, 8, 2)
    found = bench.rollouts(case(bench, shape), vocab_size=50)
    assert found == bench.rollouts(case(bench, shape), vocab_size=50)
    assert [len(r.prompt_ids) for r in found] == [16] * 16
    lengths = [len(r.completion_ids) for r in found]
    assert max(lengths) == 64 and len(set(lengths)) > 8
    assert [r.prompt_ids for r in found[:8]] == [found[0].prompt_ids] * 8
    assert found[0].prompt_ids != found[8].prompt_ids
    tokens = {token for r in found for token in r.completion_ids}
    assert min(tokens) >= 3 and max(tokens) < 50
    assert all(r.advantage for r in found)


def test_completions_are_half_of_the_longest_in_the_median(bench: ModuleType) -> None:
    found = bench.rollouts(case(bench, bench.Shape(4, 64, 500, 2)), vocab_size=50)
    lengths = torch.tensor([float(len(r.completion_ids)) for r in found])
    assert abs(lengths.median() - 32) <= 2
    # sigma 0.5 of the logarithm: two thirds lie within a factor of exp(0.5)
    within = ((lengths / 32).log().abs() < 0.5).float().mean()
    assert abs(within - 0.68) < 0.05


def test_a_quarter_without_signal_is_one_group_of_four(bench: ModuleType) -> None:
    quarter = case(bench, bench.Shape(4, 8, 3, 2), without_signal=True)
    advantages = torch.tensor([r.advantage for r in bench.rollouts(quarter, 50)]).view(4, 3)
    assert [bool(group.any()) for group in advantages] == [True, True, True, False]
    torch.testing.assert_close(advantages.sum(1), torch.zeros(4))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((64, 64, 8, 2), 16), ((256, 64, 8, 2), 8), ((512, 256, 8, 1), 4), ((5000, 1, 8, 1), 1)],
)
def test_padded_rows_keep_to_the_budget_and_divide_the_batch(
    bench: ModuleType, shape: tuple[int, ...], rows: int
) -> None:
    assert case(bench, bench.Shape(*shape)).rows == rows


def figures(time: float, tokens: float, peak: float, resting: float) -> dict[str, list[float]]:
    return {
        "time": [time, time],
        "cpu": [time],
        "tokens/forwarded": [tokens],
        "memory/peak": [peak],
        "memory/resting": [resting],
    }


def test_bars_are_met_or_missed_one_by_one(bench: ModuleType) -> None:
    one = case(bench, bench.CPU[0])

    def said(**changes: Any) -> list[str]:
        theirs = {"time": 5.0, "tokens": 300, "peak": 11, "resting": 1} | changes
        samples = {"fusedgrpo": figures(1, 100, 10, 1), "trl": figures(**theirs)}
        return [line.split()[0] for line in bench.verdicts(one, samples, ["trl"])[1:]]

    assert said() == ["met"] * 4
    assert said(time=4.99) == ["MISSED", "met", "met", "met"]
    assert said(tokens=501) == ["met", "MISSED", "met", "met"]
    assert said(time=0.9) == ["MISSED", "MISSED", "MISSED", "met"]
    assert said(peak=10) == ["met", "met", "met", "MISSED"]
    # More memory in all, but only because it had more before.
    assert said(resting=3) == ["met", "met", "met", "MISSED"]
    assert said(time=float("nan")) == ["MISSED", "MISSED", "MISSED", "met"]


def test_pefts_layers_have_a_bar_in_processor_time(bench: ModuleType) -> None:
    def said(cpu: float) -> list[str]:
        samples = {"fusedgrpo": figures(1, 1, 1, 1), "peft": figures(1, 1, 1, 1) | {"cpu": [cpu]}}
        return bench.verdicts(case(bench, bench.CPU[0]), samples, ["peft"])

    head, bar = said(1.21)
    assert head.endswith("against peft") and bar.split()[0] == "met" and "1.210 x" in bar
    assert said(1.19)[1].split()[0] == said(float("nan"))[1].split()[0] == "MISSED"


def test_never_slower_is_meant_of_every_round(bench: ModuleType) -> None:
    theirs = figures(5.0, 100, 11, 1) | {"time": [9.0, 9.0, 0.9]}
    ours = figures(1.0, 100, 10, 1) | {"time": [1.0, 1.0, 1.0]}
    samples = {"fusedgrpo": ours, "trl": theirs}
    missed = [
        line
        for line in bench.verdicts(case(bench, bench.CPU[0]), samples, ["trl"])
        if "MISS" in line
    ]
    assert len(missed) == 1 and "never slower: 0.90 x" in missed[0]


def test_on_a_cpu_times_are_in_units_of_our_median(bench: ModuleType) -> None:
    ours = figures(0, 1, 1, 1) | {"time": [2.0, 4.0, 8.0], "cpu": [1.0]}
    off = figures(0, 1, 1, 1) | {"time": [8.0], "cpu": [1.0]}
    peer = figures(0, 1, 1, 1) | {"time": [16.0], "cpu": [3.0]}
    samples = {bench.harness.OURS: ours, bench.OFF: off, "trl": peer}
    found = bench.compared(samples, bench.harness.OURS, ["trl"], "cpu")
    assert found["fusedgrpo"]["time"] == [0.5, 1.0, 2.0] and found["trl"]["time"] == [4.0]
    found = bench.compared(samples, bench.OFF, ["trl"], "cpu")
    assert list(found) == ["fusedgrpo", "trl"] and found["trl"]["time"] == [2.0]
    found = bench.compared(samples, bench.harness.OURS, ["trl"], "cuda")
    assert found["fusedgrpo"]["time"] == [2e3, 4e3, 8e3]


@pytest.mark.parametrize(("loss", "gradient"), [(1.001, 1.0), (1.0, 1.01), (float("nan"), 1.0)])
def test_another_loss_or_gradient_than_ours_ends_the_bench(
    bench: ModuleType, loss: float, gradient: float, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = {"loss": 1.0, "gradient": torch.ones(5).numpy()}
    bench.check({"fusedgrpo": ours, "trl": ours}, 1e-3)
    other = {"loss": loss, "gradient": (gradient * torch.ones(5)).numpy()}
    with pytest.raises(SystemExit):
        bench.check({"fusedgrpo": ours, "trl": other}, 1e-3)
    assert "trl" in capsys.readouterr().err


def test_four_bits_leave_the_head_and_the_adapters_alone(bench: ModuleType, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    models = bench.models
    models.tiny_model(tmp_path, ["a few words"] * 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = model(input_ids=torch.arange(5)[None]).logits.float()
    model = models.with_adapter(models.in_four_bits(model))
    causal_lm = model.get_base_model()
    layer = causal_lm.model.layers[0].mlp.down_proj
    assert isinstance(layer.base_layer, bnb.nn.Linear4bit)
    assert layer.base_layer.weight.dtype == torch.uint8
    assert isinstance(causal_lm.lm_head, torch.nn.Linear)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        after = model(input_ids=torch.arange(5)[None]).logits.float()
    assert 0 < (after - before).norm() < 0.3 * before.norm()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (str(BENCH.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(BENCH / "bench_update.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=HUNG,
    )


def test_a_shape_that_is_not_there_is_refused() -> None:
    result = run("--quick", "--shapes", "1")
    assert result.returncode == 2 and "0 to 0" in result.stderr


def check(tmp_path: Path, *arguments: str) -> tuple[str, dict[tuple[str, str, str], Any]]:
    """Run it; what it printed, and its figures by case, contender and metric."""
    file = tmp_path / "update.jsonl"
    result = run("--quick", "--rounds", "1", "--threads", "1", "--json", str(file), *arguments)
    assert result.returncode == 0, result.stderr
    text = file.read_text()
    assert socket.gethostname() not in text and str(Path.home()) not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["bench"] for row in rows} == {"update"}
    assert not [row for row in rows if row["unit"] in ("s", "ms")]
    return result.stdout, {(r["case"], r["impl"], r["metric"]): r["value"] for r in rows}


def test_alone_there_is_nothing_to_compare_with(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = ("time", "cpu", "tokens/forwarded", "memory/peak", "memory/resting")

    def measure(case: Any, ours: list[str], peers: list[str], *_: Any) -> Any:
        return {name: {metric: [2.0] for metric in metrics} for name in (*ours, *peers)}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "cases", lambda *_: [case(bench, bench.QUICK[0])])
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_update.py", "--quick", "--json", str(file)])
    bench.main()
    assert "nothing to compare with" in capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["impl"] for row in rows} == {"fusedgrpo"}
    assert len({row["case"] for row in rows}) == 2


@pytest.mark.slow
@pytest.mark.peer
def test_bench_update_compares_equal_work_with_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    shown, found = check(tmp_path, "--peers", "trl,peft")
    assert shown.count("in processor time") == 2
    assert shown.count("gate: relative error") == 4
    assert shown.count("never slower") == 2
    names = {name for name, _, _ in found}
    off = {name for name in names if name.endswith("shared_prompt=off")}
    assert len(names) == 4 and len(off) == 2
    tokens = {
        (impl, "1/4" in name): value
        for (name, impl, metric), value in found.items()
        if metric == "tokens/forwarded" and name not in off
    }
    G, padded = 4, 24 + 8
    assert tokens["trl", False] == 2 * G * padded and tokens["trl", True] == 4 * G * padded
    # Two prompts once each, and less than all but the last token of each completion.
    assert 2 * 24 < tokens["fusedgrpo", False] < 2 * (24 + G * 7)
    # Three prompts, since nothing is forwarded of the fourth.
    assert 3 * 24 < tokens["fusedgrpo", True] < 3 * (24 + G * 7)
