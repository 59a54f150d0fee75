"""Settings of torch for a whole run, and the options of data and display beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine import torch_settings
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError

PROMPTS = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w5 w5", "w20 w4")]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    environment = dict(os.environ)
    before = torch.are_deterministic_algorithms_enabled()
    cudnn, precision = torch.backends.cudnn, torch.backends.fp32_precision
    flags = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(before)
    cudnn.deterministic, cudnn.benchmark = flags
    torch.backends.fp32_precision = precision
    os.environ.clear()
    os.environ.update(environment)


def even_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def trained(path: Path, **changes: Any) -> GRPOTrainer:
    options = {
        "output_dir": str(path), "num_generations": 2, "prompts_per_step": 2, "max_steps": 3,
        "max_completion_length": 5, "learning_rate": 1e-2, "save_strategy": "no", "bf16": False,
        "use_cpu": True, "top_p": 0.9, "top_k": 20, "beta": 0.1,
    } | changes  # fmt: skip
    made = GRPOTrainer(
        tiny.model(), even_ids, GRPOConfig(**options), PROMPTS, processing_class=tiny.tokenizer()
    )
    made.train()
    return made


def test_full_determinism_sets_what_transformers_sets_and_changes_no_bit(tmp_path: Path) -> None:
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b", full_determinism=True)]
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    first, second = ([p for _, p in run.policy.trainable()] for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    losses = [[row["loss"] for row in read_metrics(tmp_path / d / "metrics.jsonl")] for d in "ab"]
    assert losses[0] == losses[1]
    # Another order of the prompts, from the same run otherwise.
    other = trained(tmp_path / "c", data_seed=1, max_steps=1)
    orders = [[e.prompt for e in run.stream.peek(5)] for run in (runs[0], other)]
    other.stream.seed = 42
    other.stream._order = (-1, [])
    other.stream.cursor = runs[0].stream.cursor = 0
    assert [e.prompt for e in other.stream.peek(5)] == [e.prompt for e in runs[0].stream.peek(5)]
    assert orders[0] != orders[1] and other.args.seed == 42


def test_tf32_is_set_where_there_is_one_and_refused_where_not() -> None:
    with pytest.raises(ConfigError, match="tf32: cpu here has no TF32"):
        torch_settings.apply(GRPOConfig(tf32=True, use_cpu=True))
    torch.backends.fp32_precision = "tf32"
    torch_settings.apply(GRPOConfig(use_cpu=True))
    assert torch.backends.fp32_precision == "tf32"
    torch_settings.apply(GRPOConfig(tf32=False, use_cpu=True))
    assert torch.backends.fp32_precision == "ieee"


def test_lines_take_the_place_of_the_panel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fusedgrpo.engine.reporting import display

    monkeypatch.setattr(display, "overwrites", lambda console: True)
    seen: list[bool] = []
    enter = display.Display.__enter__
    monkeypatch.setattr(
        display.Display, "__enter__", lambda self: [seen.append(self.is_live), enter(self)][1]
    )
    for off in (True, None):
        trained(tmp_path / str(off), max_steps=1, disable_tqdm=off, logging_dir=str(tmp_path / "l"))
    assert seen == [False, True]
