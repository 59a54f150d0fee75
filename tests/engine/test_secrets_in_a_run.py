"""A whole run with secrets among its options: they are in none of its files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.errors import CheckpointError


def judge(completions: list[str], api_key: str, log_extra: Any, **kwargs: Any) -> list[float]:
    log_extra("request", [f"POST /?key={api_key}"] * len(completions))
    logging.getLogger("fusedgrpo").warning("401 for %s", api_key)
    return [float(len(c) % 2) for c in completions]


def make(directory: Path, key: str, **more: Any) -> GRPOTrainer:
    options = {
        "output_dir": str(directory),
        "num_generations": 2,
        "prompts_per_step": 1,
        "max_completion_length": 4,
        "max_steps": 1,
        "save_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "reward_kwargs": {"judge": {"api_key": key, "headers": {"x": f"{key}-header"}, **more}},
        "chat_template_kwargs": {"password": f"{key}-password"},
    }
    return GRPOTrainer(
        model=tiny.model(),
        reward_funcs=judge,
        args=GRPOConfig(**options),
        train_dataset=[{"prompt": "w4 w5"}],
        tokenizer=tiny.tokenizer(),
    )


def test_no_file_of_a_run_holds_a_secret_and_another_may_take_its_place(tmp_path: Path) -> None:
    make(tmp_path, "Zx81-qq77").train()
    make(tmp_path, "another-55").train(resume_from_checkpoint=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.resolved.yaml", "state.json", "report.html", "run.log"} <= {
        path.name for path in files
    }
    for path in files:
        content = path.read_bytes()
        assert b"Zx81-qq77" not in content and b"another-55" not in content, path
    with pytest.raises(CheckpointError, match="reward_kwargs"):
        make(tmp_path, "another-55", strict=True).train(resume_from_checkpoint=True)
