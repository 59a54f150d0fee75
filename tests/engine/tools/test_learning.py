"""A scripted policy learns to call a tool, and to call it right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import caller
import pytest

from fusedgrpo import GRPOConfig, GRPOTrainer

STEPS = 12
QUESTION = {"prompt": [{"role": "user", "content": "double 3"}], "answer": "6"}


def told(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the tool gave the answer: neither a guess nor a wrong call is worth anything."""
    return [
        float({"role": "tool", "name": "double", "content": right} in messages)
        for messages, right in zip(completions, answer, strict=True)
    ]


@pytest.mark.slow
def test_a_policy_learns_to_call_its_tool(tmp_path: Path) -> None:
    # Only the table of words has anything to learn; by plain descent the empty layers stay empty,
    # which Adam would fill with the noise of their tiny gradients.
    trainer = GRPOTrainer(
        model=caller.model(),
        processing_class=caller.tokenizer(),
        reward_funcs=told,
        train_dataset=[QUESTION, QUESTION],
        tools=[caller.double],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            finetuning_type="full",
            optim="sgd",
            learning_rate=2.0,
            lr_scheduler_type="constant",
            max_steps=STEPS,
            num_generations=16,
            prompts_per_step=2,
            max_completion_length=40,
            max_tool_calling_iterations=1,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            drift_check=False,
        ),
    )
    rows = [trainer.step() for _ in range(STEPS)]
    trainer.asking.close()
    rewards = [row["reward"] for row in rows]
    assert rewards[0] < 0.3 < 0.9 < sum(rewards[-5:]) / 5
