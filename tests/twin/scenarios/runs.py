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
from fusedgrpo.engine.rollout import decoder_sampler  # noqa: E402
from fusedgrpo.engine.rollout.decode_loop import How  # noqa: E402

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(4)]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"beta": 0.1, "rehearsal": True},
    "qlora": {"load_in_4bit": True},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3, "beta": 0.1, "sampler": "generate"},
    "memory saved": {
        "activation_offloading": True,
        "gradient_checkpointing": True,
        "rehearsal": True,
        "sampler": "generate",
    },
    "whole sequences in float32": {"bf16": False, "shared_prompt": "off"},
    "windows with correction": {
        "prompts_per_step": 1,
        "num_iterations": 2,
        "sampler_correction": True,
        "beta": 0.1,
        "max_steps": 2,
        "save_steps": 1,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "eval_steps": 2,
    },
    "capability 7.5": {},
    "capability 7.5 in float32": {"bf16": False, "sampler": "generate"},
}


def by_turns(completions: Any, **kwargs: Any) -> list[float]:
    """Every group has signal."""
    return [float(i % 2) for i in range(len(completions))]


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
        "rehearsal": False,
    } | changes
    return GRPOTrainer(
        model=str(model),
        reward_funcs=by_turns,
        args=GRPOConfig(**values),
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:1] if "eval_strategy" in changes else None,
        processing_class=tiny.tokenizer(),
    )


def trained(directory: Path, **changes: Any) -> Any:
    """A run, and what it left; where it left a checkpoint, whether it ends the same from there."""
    model = model_files(directory / "model")
    run = make(directory / "run", model, **changes)
    before = [p.detach().clone() for _, p in run.policy.trainable()]
    run.train()
    after = [p.detach().clone() for _, p in run.policy.trainable()]
    told = {
        "device": str(run.policy.device),
        "layout": run.policy.layout,
        "precision": run.policy.precision,
        "moved": sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "finite": all(bool(p.isfinite().all()) for p in after),
        "rows": read_metrics(directory / "run" / "metrics.jsonl"),
    }
    checkpoint = directory / "run/checkpoints/step-000001"
    if checkpoint.exists():
        again = make(directory / "again", model, **changes)
        again.train(resume_from_checkpoint=str(checkpoint))
        ends = [p for _, p in again.policy.trainable()]
        told["ends the same"] = all(torch.equal(a, b) for a, b in zip(after, ends, strict=True))
    return told


@contextlib.contextmanager
def on_the_twin() -> Iterator[None]:
    """Without what the twin has not, CUDA graphs, and without what takes long and is no question
    here: plots, the memory plan and most tokens of the decoder's trial."""
    short = [[5, 6, 7]], [[8, 9]]
    with (
        mock.patch.object(How, "on", lambda device: How(behind=1)),
        mock.patch.object(plots, "render", lambda name, rows: b""),
        mock.patch.object(setup, "memory_plan_of", lambda *args, **kwargs: None),
        mock.patch.object(decoder_sampler, "few_tokens", lambda vocabulary: short),
    ):
        yield


def of_trl(fused_rollouts: bool) -> Any:
    """``FusedGRPOTrainer``, and what one step of its loss asks of the device."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    from fusedgrpo.integrations.trl import FusedGRPOTrainer

    with tempfile.TemporaryDirectory() as directory, on_the_twin():
        model = model_files(Path(directory, "model"))
        run = FusedGRPOTrainer(
            model=str(model),
            reward_funcs=by_turns,
            args=trl.GRPOConfig(
                output_dir=directory, per_device_train_batch_size=2, num_generations=2,
                gradient_accumulation_steps=2, max_completion_length=4, max_steps=1, bf16=True,
                learning_rate=1e-2, report_to="none", logging_steps=1, save_strategy="no",
                gradient_checkpointing=False,
                model_init_kwargs={"dtype": "bfloat16", "device_map": None},
            ),
            train_dataset=Dataset.from_list(PROMPTS),
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            fused_rollouts=fused_rollouts,
        )  # fmt: skip
        twin.watch(run.model)
        loss, costs = run._compute_loss, []

        def counted(*args: Any, **kwargs: Any) -> Any:
            with twin.counted() as counts:
                result = loss(*args, **kwargs)
            costs.append(counts.plain())
            return result

        run._compute_loss = counted
        run.train()
    return {
        "device": str(run.accelerator.device),
        "history": [row for row in run.state.log_history if "loss" in row],
        "losses": costs,
    }


def scenario(kind: str) -> Any:
    with (
        tempfile.TemporaryDirectory() as directory,
        on_the_twin(),
        twin.of_capability((7, 5) if "7.5" in kind else (9, 0)),
    ):
        return trained(Path(directory), **KINDS[kind])


if __name__ == "__main__":
    native = {kind: functools.partial(scenario, kind) for kind in KINDS}
    leave(native | {f"trl, {said}": functools.partial(of_trl, said) for said in (False, True)})
