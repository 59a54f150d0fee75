"""bench/roofline.py bounds a step of a config.json, and knows the rows of other benches."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo.engine.roofline.shape import Shape

BENCH = Path(__file__).parents[2] / "bench"
GPU = BENCH / "results" / "2026-11-26-gpu"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("roofline")


@functools.cache
def small_shape() -> Shape:
    built = tiny.add_lora(tiny.model("Llama", vocab_size=300))
    return Shape.of(built.get_base_model(), 2)


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline.py", *options])
    module.main()


def values(file: Path) -> dict[tuple[str, str], float]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows and all(row["bench"] == "roofline" and row["machine"] for row in rows)
    return {(row["impl"], row["metric"]): row["value"] for row in rows}


def test_a_step_of_a_configuration(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny.model("Qwen2").config.save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    options = ("--quick", "--model", str(tmp_path / "model"), "--json", str(file))
    run(roofline, monkeypatch, *options, "--card", "t4", "--bandwidth", "100", "--launch", "2")
    found = values(file)
    for part in ("merged decoding", "adapter prompts", "merging", "scoring", "update"):
        longer = max(found[part, "compute"], found[part, "memory"])
        assert found[part, "bound"] == pytest.approx(longer)
        assert found[part, "compute"] == pytest.approx(1e3 * found[part, "flops"] / 65e12)
        assert found[part, "memory"] == pytest.approx(1e3 * found[part, "bytes"] / 100e9)
        assert found[part, "launches"] == pytest.approx(2e-3 * found[part, "kernels/needed"])
    assert found["update", "flops"] > 2.5 * found["scoring", "flops"]
    with pytest.raises(SystemExit):
        run(roofline, monkeypatch, *options, "--card", "H2000")


@pytest.mark.parametrize(
    ("part", "impls"),
    [
        ("rollout", {"fusedgrpo", "fusedgrpo adapter", "hf", "trl", "cb"}),
        ("update", {"fusedgrpo", "trl"}),
        ("step", {"fusedgrpo, sample", "fusedgrpo, update", "trl, sample", "trl, update"}),
        ("profile", {"update", "scoring", "recorded", "by itself"}),
    ],
)
def test_rows_of_an_h200(
    roofline: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    part: str,
    impls: set[str],
) -> None:
    """Their lengths are drawn once more, and are those that the rows say."""
    monkeypatch.setattr(roofline, "shape_of", lambda *args: small_shape())
    file = tmp_path / "rows.jsonl"
    run(roofline, monkeypatch, "--measured", f"{GPU}-{part}.jsonl", "--json", str(file))
    found = values(file)
    assert {impl for impl, _ in found} == impls
    for impl in impls:
        assert found[impl, "reached"] == pytest.approx(found[impl, "bound"] / found[impl, "time"])
    assert "H200 with 989.5 TFLOP/s" in capsys.readouterr().out


def test_what_is_not_known_is_left_out_and_said(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roofline, "shape_of", lambda *args: small_shape())
    profile = f"{GPU}-profile.jsonl"
    run(roofline, monkeypatch, "--measured", profile, "--model", "llama-3.1-8b")
    assert "5 cases left out of another bench or model" in capsys.readouterr().out
    monkeypatch.setattr(roofline, "find_card", lambda name: None)
    run(roofline, monkeypatch, "--measured", profile)
    assert "left out of a card whose speed is not known: NVIDIA H200" in capsys.readouterr().out
    run(roofline, monkeypatch, "--measured", profile, "--tflops", "900", "--bandwidth", "4000")
    assert "NVIDIA H200 with 900 TFLOP/s and 4,000 GB/s" in capsys.readouterr().out


def test_the_words_of_the_benches_are_understood(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench_rollout, bench_update, bench_step, rows_module = map(
        importlib.import_module, ("bench_rollout", "bench_update", "bench_step", "roofline_rows")
    )
    given: dict[str, Any] = {
        "tokens": 96, "generations": 8, "prompts": 4, "prompt_tokens": 16, "lengths": "lognormal",
        "bf16": True, "four_bit": True, "device": "cuda", "threads": 1, "rank": 64,
    }  # fmt: skip
    asked = []

    def shape_of(four_bit: bool, rank: int) -> Shape:
        asked.append((four_bit, rank))
        return small_shape()

    drawn = bench_rollout.draw(argparse.Namespace(**given), 300, "m")
    rows = {"hf": {"time": 2.0, "useful": drawn.tokens / 2}}
    assert rows_module.rollout(drawn.describe(), rows, shape_of)["hf"].seconds == 2
    rows["hf"]["useful"] *= 1.1
    with pytest.raises(SystemExit, match="did not have"):
        rows_module.rollout(drawn.describe(), rows, shape_of)

    sizes = bench_update.Shape(20, 12, 4, 2)
    for without in (False, True):
        case = bench_update.Case("m", "", sizes, without, "cuda", torch.bfloat16, 1, 256)
        pairs = [r for r in bench_update.rollouts(case, 300) if r.advantage]
        prompts = 20 * (3 if without else 2)
        forwarded = prompts + sum(len(r.completion_ids) - 1 for r in pairs)
        rows = {"fusedgrpo": {"time": 5.0, "tokens/forwarded": forwarded}}
        done = rows_module.update(case.describe(), rows, shape_of)
        assert done["fusedgrpo"].seconds == 5e-3
        apart = rows_module.update
        rows["fusedgrpo"]["tokens/forwarded"] = 20 * len(pairs) + forwarded - prompts
        off = apart(f"{case.describe()}, shared_prompt=off", rows, shape_of)
        assert off["fusedgrpo"].work.flops > done["fusedgrpo"].work.flops

    step = bench_step.Case("m", "", (), 1, max_tokens=24, device="cuda", peer_rows=2)
    figures = {"time/sample": 1.0, "time/update": 2.0, "tokens/forwarded_grad": 2 * 30 + 16 * 23}
    found = rows_module.step(step.describe(), {"fusedgrpo": figures}, shape_of)
    assert [done.seconds for done in found.values()] == [1, 2]
    assert set(asked) == {(True, 64), (True, 16)}
