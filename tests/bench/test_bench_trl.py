"""``bench_trl.py``: equal work for both trainers, what it makes of the figures, and a real run."""

from __future__ import annotations

import dataclasses
import importlib
import json
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
from torch import nn

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_trl")


def case(bench: ModuleType, shape: Any, **changes: Any) -> Any:
    of = bench.update.Case("m", "nowhere", shape, False, "cpu", torch.float32, 1, 4096)
    return dataclasses.replace(bench.Case(of, prepared=False, beta=0.0), **changes)


def test_completions_are_cut_and_end_with_eos_but_for_the_longest(bench: ModuleType) -> None:
    sampled = [[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]]
    assert bench.cut(sampled, [4, 2, 1], eos=9) == [[11, 12, 13, 14], [21, 9], [9]]


def parsed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["bench_trl.py", *arguments])
    return bench.arguments()


def test_the_headline_is_the_default_and_prompts_per_step_can_be_chosen(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench.models, "smollm2", lambda directory: None)

    def shapes(*arguments: str) -> list[tuple[int, ...]]:
        cases = bench.cases(parsed(bench, monkeypatch, *arguments), tmp_path)
        assert not [c for c in cases if c.of.without_signal]
        return [(*c.of.shape[:3], c.of.groups, c.of.rows) for c in cases]

    assert shapes() == [(256, 64, 8, 2, 8)]
    assert shapes("--groups", "3", "--shapes", "0,1") == [(64, 64, 8, 3, 24), (256, 64, 8, 3, 12)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quick", "--shapes", "1"], "0 to 0"),
        (["--shapes", "4"], "0 to 3"),
        (["--groups", "0"], "at least 1"),
    ],
)
def test_what_is_not_there_is_refused(
    bench: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    with pytest.raises(SystemExit):
        parsed(bench, monkeypatch, *arguments)
    assert said in capsys.readouterr().err


def figures(update: float, step: float, peak: float) -> dict[str, list[float]]:
    return {
        "time/update": [update, update, 100 * update],
        "cpu/update": [update],
        "time/step": [step],
        "time/sample": [2.0],
        "memory/peak": [peak],
        "memory/peak_update": [peak / 2],
    }


def test_headlines_are_ratios_of_medians_of_the_variant(bench: ModuleType) -> None:
    samples = {
        "fusedgrpo": figures(2.0, 5.0, 10),
        bench.FUSED_LOSS: figures(1.0, 4.0, 5),
        "trl": figures(8.0, 10.0, 20),
    }

    def said(variant: str, shape: Any = bench.update.CPU[1], **changes: Any) -> list[str]:
        return bench.verdicts(case(bench, shape, **changes), samples, variant, ["trl"])

    first, update, step, memory = said("fusedgrpo")
    assert first == "  (256, 64, 8) x 2, against trl"
    assert "update 4.00 x" in update and "met    at least 4 x" in update
    assert "whole step 2.00 x; generation is 20% of it for trl and 40% for us" in step
    assert "peak memory 2.00 x, of the update 2.00 x" in memory
    first, update, step, memory = said(bench.FUSED_LOSS)
    assert "fused_loss" in first and "update 8.00 x" in update and "memory 4.00 x" in memory
    assert "50% for us" in step

    samples["trl"]["cpu/update"] = [7.99]
    assert "MISSED" in said("fusedgrpo")[1]
    samples["trl"] |= {"time/update": [7.99], "cpu/update": [8.0]}
    assert "MISSED" in said("fusedgrpo")[1]
    # The bar is for the headline, with any number of prompts.
    assert "MISSED" in said("fusedgrpo", bench.update.CPU[1]._replace(groups=1))[1]
    assert "at least" not in said("fusedgrpo", bench.update.CPU[0])[1]
    assert not [line for line in said("fusedgrpo", prepared=True) if "generation" in line]


@pytest.mark.parametrize("key", ["loss", "reward", "completions/mean_length", "gradient"])
@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_another_log_or_gradient_than_the_peers_ends_the_bench(
    bench: ModuleType, key: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(**changes: float) -> dict[str, Any]:
        gradient = changes.pop("gradient", 1.0) * torch.ones(5).numpy()
        return {
            "logged": dict.fromkeys(bench.LOGGED, 1.0) | changes,
            "weights": {"gradient": gradient},
        }

    answers = {"fusedgrpo": answer(), bench.FUSED_LOSS: answer(), "trl": answer()}
    bench.check(answers, truth="trl")
    answers[bench.FUSED_LOSS] = answer(**{key: value})
    with pytest.raises(SystemExit):
        bench.check(answers, truth="trl")
    assert f"{bench.FUSED_LOSS}: {key}" in capsys.readouterr().err


class Turns:
    """Asks for these steps, and keeps the answers."""

    def __init__(self, *requests: str):
        self.requests = list(requests)
        self.answers: list[dict[str, Any]] = []

    def wait(self) -> str:
        return self.requests.pop(0)

    def answer(self, value: dict[str, Any]) -> None:
        self.answers.append(value)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Embedding(3, 2)

    def get_base_model(self) -> Any:
        return self

    def get_decoder(self) -> nn.Module:
        return self.decoder


def test_phases_of_a_step_add_up_and_memory_is_told_apart(bench: ModuleType) -> None:
    turns, model = Turns("gate", "step"), Model()
    probe = bench.Probe(turns, model)
    optimizer = torch.optim.SGD(model.parameters())
    model.decoder(torch.tensor([2]))  # before the step: not counted
    logs = dict.fromkeys(bench.LOGGED, 1.5)
    for _ in range(2):
        probe.begin()
        with probe.phase("rollout"):
            with probe.phase("sample"):
                much = torch.ones(2**25)  # 128 MiB
                time.sleep(0.02)
            del much
            time.sleep(0.01)
        optimizer.zero_grad()
        (3 * model.decoder(torch.tensor([0, 1]))).sum().backward()
        time.sleep(0.03)
        optimizer.step()
        probe.end()
        probe.answer(logs)

    gate, step = turns.answers
    assert gate["logged"] == logs
    assert gate["weights"]["gradient"].tolist() == [3, 3, 3, 3, 0, 0]
    found = gate["figures"]
    assert found["memory/peak"] - found["memory/resting"] > 2**26
    assert found["memory/peak"] - found["memory/peak_update"] > 2**26
    assert found["tokens/forwarded_grad"] == 2 and found["tokens/forwarded_no_grad"] == 0

    assert step["time/sample"] >= 0.02 and step["time/score"] >= 0.01
    assert step["time/update"] >= 0.03
    parts = step["time/sample"] + step["time/score"] + step["time/update"]
    assert parts == pytest.approx(step["time/step"])
    assert step["cpu/update"] < step["cpu/step"] < step["time/step"]
    assert step["log/loss"] == step["log/reward"] == 1.5
    assert set(step) | set(found) == set(bench.UNITS)


def run(tmp_path: Path, *arguments: str) -> tuple[str, list[dict[str, Any]]]:
    """What it printed, and its rows."""
    file = tmp_path / "trl.jsonl"
    path = os.pathsep.join(filter(None, (str(BENCH.parent), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, str(BENCH / "bench_trl.py"), "--quick", "--rounds", "2", "--threads", "1",
         "--json", str(file), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=HUNG,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text = file.read_text()
    assert socket.gethostname() not in text and str(Path.home()) not in text
    return result.stdout, [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("mode", [["--beta", "0.1"], ["--prepared"]])
def test_bench_trl_compares_equal_work_with_trl(tmp_path: Path, mode: list[str]) -> None:
    pytest.importorskip("trl")
    shown, rows = run(tmp_path, "--peers", "trl", *mode)
    prepared = mode == ["--prepared"]
    assert shown.count("gate: relative error") == 2 and "nothing to compare" not in shown
    assert shown.count("update ") >= 2 and shown.count("generation is") == (0 if prepared else 2)
    names = {row["case"] for row in rows}
    assert {row["bench"] for row in rows} == {"trl"} and len(names) == 2
    assert len([name for name in names if name.endswith("fused_loss")]) == 1
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["case"], row["impl"], row["metric"]), []).append(row["value"])
    G, padded = 4, 24 + 8
    for name in names:
        # The same completions in all rounds, after an optimizer step too.
        for metric in ("log/loss", "log/reward"):
            every = metric if prepared else f"{metric}/round"
            assert found[name, "fusedgrpo", every] == pytest.approx(
                found[name, "trl", every], rel=1e-4
            )
        assert found[name, "trl", "tokens/forwarded_grad"] == [2 * G * padded]
        # Two prompts once each, and less than all but the last token of each completion.
        assert 2 * 24 < found[name, "fusedgrpo", "tokens/forwarded_grad"][0] < 2 * (24 + G * 7)
        ours, theirs = (
            found[name, impl, "tokens/forwarded_no_grad"][0] for impl in ("fusedgrpo", "trl")
        )
        # Of the same generation, and with beta of the reference's log-probs, packed by ours alone.
        assert theirs == 0 if prepared else ours < theirs
