"""Whole runs on the CUDA twin; see test_runs.py."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import tiny
import torch
from cuda_twin.process import leave
from cuda_twin.twin import install

twin = install()

from fusedgrpo import GRPOConfig, GRPOTrainer  # noqa: E402
from fusedgrpo.engine import setup  # noqa: E402
from fusedgrpo.engine.reporting import plots  # noqa: E402
from fusedgrpo.engine.reporting.metrics_log import read_metrics  # noqa: E402
from fusedgrpo.engine.rollout.decode_loop import How  # noqa: E402

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(7)]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"beta": 0.1},
    "float32": {"bf16": False, "rehearsal": False},
    "float16": {"bf16": False, "fp16": True, "rehearsal": False},
    "qlora": {"load_in_4bit": True},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3, "beta": 0.1},
    "offload": {"activation_offloading": True, "gradient_checkpointing": True},
    "generate": {"sampler": "generate", "rehearsal": False},
    "whole sequences": {"shared_prompt": "off", "rehearsal": False},
    "a window with correction": {
        "num_iterations": 2,
        "steps_per_generation": 2,
        "sampler_correction": True,
        "beta": 0.1,
        "rehearsal": False,
        "max_steps": 3,
    },
    "held out": {"eval_strategy": "steps", "eval_steps": 1, "rehearsal": False},
}


def even_ids(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def model_files(directory: Path, layers: int = 1) -> Path:
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64}
    built = tiny.model("Llama", scale=3.0, num_hidden_layers=layers, **sizes)
    return tiny.save(directory, built.bfloat16())


def make(directory: Path, model: Path, **changes: Any) -> GRPOTrainer:
    values = {
        "output_dir": str(directory),
        "num_generations": 2,
        "prompts_per_step": 2,
        "max_completion_length": 4,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "lora_r": 8,
        "save_strategy": "no",
        "gradient_checkpointing": False,
    } | changes
    return GRPOTrainer(
        model=str(model),
        reward_funcs=even_ids,
        args=GRPOConfig(**values),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2] if "eval_strategy" in changes else None,
        processing_class=tiny.tokenizer(),
    )


def trained(**changes: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        model = model_files(Path(directory, "model"))
        run = make(Path(directory, "run"), model, **changes)
        before = [p.detach().clone() for _, p in run.policy.trainable()]
        run.train()
        after = [p.detach().clone() for _, p in run.policy.trainable()]
        rows = read_metrics(Path(directory, "run", "metrics.jsonl"))
    return {
        "device": str(run.policy.device),
        "layout": run.policy.layout,
        "precision": run.policy.precision,
        "moved": sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "rows": rows,
    }


@contextlib.contextmanager
def on_the_twin(*, planned: bool = False) -> Iterator[None]:
    """Without what the twin has not, CUDA graphs, and without what takes long and is nobody's
    question here: plots and, unless ``planned``, the memory plan."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(How, "on", lambda device: How(behind=1)))
        stack.enter_context(mock.patch.object(plots, "render", lambda name, rows: b""))
        if not planned:
            stack.enter_context(mock.patch.object(setup, "memory_plan_of", lambda *a, **k: None))
        yield


def scenario(kind: str) -> Any:
    with on_the_twin(planned=kind == "lora"):
        return trained(**KINDS[kind])


if __name__ == "__main__":
    leave({kind: functools.partial(scenario, kind) for kind in KINDS})
