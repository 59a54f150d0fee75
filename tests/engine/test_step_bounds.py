"""The share of the bound in the rows of a run, as on a GPU that is known, and where there is none.

No test has a GPU: the name of one is given to a run on a CPU, whose shares are tiny.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer, host
from fusedgrpo.engine.metric_names import is_own_metric
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.roofline import work
from fusedgrpo.engine.roofline.cards import find_card
from fusedgrpo.engine.roofline.work import Asked, Work
from fusedgrpo.engine.run_description import described
from fusedgrpo.engine.step_bounds import StepBounds, card_name

H200 = "NVIDIA H200"
PROMPTS = [{"prompt": p} for p in ("w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w13 w14")]


@pytest.fixture(autouse=True)
def computes_in_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_bfloat16", lambda device: True)


def even_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) + len(ids) for ids in completion_ids]


def make(path: Path, *, gpu: str | None = H200, model: Any = None, **options: Any) -> GRPOTrainer:
    args = GRPOConfig(
        output_dir=str(path), use_cpu=True, num_generations=3, prompts_per_step=2, lora_r=2,
        max_completion_length=6, held_out_check=False, drift_check=False,
        **{"max_steps": 2, "bf16": True, "gradient_checkpointing": False} | options,
    )  # fmt: skip
    run = GRPOTrainer(model or tiny.model("Llama"), even_ids, args, PROMPTS, None, tiny.tokenizer())
    run.bounds = StepBounds(run, gpu)
    return run


def rooflines(row: dict[str, Any]) -> dict[str, float]:
    return {k.removeprefix("roofline/"): v for k, v in row.items() if k.startswith("roofline/")}


def test_a_row_has_the_bound_of_its_work_over_its_time(tmp_path: Path) -> None:
    run = make(tmp_path, rollout_weights="merged")
    kept: dict[str, Any] = {}
    collected, reached = run.bounds.collected, run.bounds.reached

    def keep_rollout(rollout: Any, buffer: Any) -> None:
        kept["groups"] = rollout.groups
        collected(rollout, buffer)

    def keep_samples(times: Any, samples: Any) -> dict[str, float]:
        kept["samples"] = list(samples)
        return reached(times, samples)

    run.bounds.collected, run.bounds.reached = keep_rollout, keep_samples  # type: ignore[method-assign]
    row = run.step()
    found = rooflines(row)
    assert set(found) == {"sample", "update"}, "nothing is scored for a single update"
    assert all(map(is_own_metric, row))
    card, shape = find_card(H200), run.bounds.shape
    assert card is not None and shape is not None
    groups = [Asked(len(g.prompt_ids), [len(c.ids) for c in g.completions]) for g in kept["groups"]]
    merged = shape.merged()
    sampled = work.merge(shape) + work.read_prompts(merged, groups) + work.decode(merged, groups)
    assert found["sample"] * row["time/sample"] == pytest.approx(sampled.seconds(card))
    live = [sample.pair for sample in kept["samples"] if sample.advantage]
    assert sum(span.length for span in work.spans(live, "shared")) == row["num_forwarded_tokens"]
    scored = sum(len(pair.completion) for pair in live)
    update = work.update(shape, work.spans(live, "shared"), scored, checkpointing=False)
    assert found["update"] * row["time/update"] == pytest.approx(update.seconds(card))


def test_scoring_counts_old_and_reference_log_probs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    forward = work.forward

    def counting(shape: Any, batch: Any, scored: int, units: int = 1) -> Work:
        passes.append(sum(p.rank for p in shape.products))
        return forward(shape, batch, scored, units)

    run = make(tmp_path, beta=0.1, num_iterations=2, max_steps=4)
    monkeypatch.setattr(work, "forward", counting)
    first = rooflines(run.step())
    with_adapter = sum(p.rank for p in run.bounds.shape.products)  # type: ignore[union-attr]
    # Rollout: prompts and tokens. Scoring: old log-probs, and the reference's without the adapter.
    assert passes == [with_adapter, with_adapter, with_adapter, 0, with_adapter]
    assert set(first) == {"sample", "score", "update"}
    assert set(rooflines(run.step())) == {"update"}, "the same rollout, a second time"


@pytest.mark.parametrize(
    ("options", "checkpointing", "entropy_gradient"),
    [
        ({"gradient_checkpointing": True}, True, False),
        ({"entropy_coef": 0.01}, False, True),
        ({"use_adaptive_entropy": True}, False, False),
    ],
)
def test_checkpointing_and_the_entropy_bonus_are_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    checkpointing: bool,
    entropy_gradient: bool,
) -> None:
    told: list[dict[str, Any]] = []
    update = work.update

    def telling(*given: Any, **how: Any) -> Work:
        told.append(how)
        return update(*given, **how)

    monkeypatch.setattr(work, "update", telling)
    assert "update" in rooflines(make(tmp_path, **options).step())
    assert told == [{"checkpointing": checkpointing, "entropy_gradient": entropy_gradient}]


def test_a_whole_run_writes_it_and_its_report_says_it(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 2 and all({"sample", "update"} == set(rooflines(row)) for row in rows)
    page = (tmp_path / "report.html").read_text()
    assert "Of the best that the GPU can do (H200, by its data sheet 990 TFLOP/s" in page


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gpu": "NVIDIA Next 9000"}, "the speed of NVIDIA Next 9000 is not known"),
        ({"bf16": False}, "it computes in float32"),
        ({"model": "mixture"}, "experts"),
    ],
)
def test_no_claim_where_it_is_not_known(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    if "model" in changes:
        changes = {"model": tiny.mixture("Mixtral"), "lora_target_modules": ["q_proj", "v_proj"]}
    run = make(tmp_path, **changes)
    assert why in str(run.bounds.unknown) or "linear layer" in str(run.bounds.unknown)
    assert rooflines(run.step()) == {}
    assert described(run)["roofline"]["unknown"] == run.bounds.unknown


def test_several_processes_have_no_claim(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.execution.processes = SimpleNamespace(size=2)  # type: ignore[assignment]
    assert StepBounds(run, H200).unknown == "there are 2 processes"


def test_without_a_gpu_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "gpu_name", lambda device: f"card of {device}")
    assert card_name(torch.device("cpu")) is None
    assert card_name(torch.device("cuda", 1)) == "card of cuda:1"
    run = make(tmp_path, gpu=None)
    assert rooflines(run.step()) == {}
    assert set(described(run)["roofline"].values()) == {None}


def test_an_update_that_chooses_its_tokens_has_no_bound(tmp_path: Path) -> None:
    assert set(rooflines(make(tmp_path, top_entropy_quantile=0.5).step())) == {"sample"}


def test_a_sampler_of_somebody_else_has_no_bound(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.run_sampler.chosen = run.run_sampler.chosen._replace(is_ours=False)
    assert set(rooflines(run.step())) == {"update"}
