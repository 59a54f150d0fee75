"""Tasks of reasoning-gym: questions as data, their verifier as the reward, others held out."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.cli import app
from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.errors import DataError, RewardError
from fusedgrpo.tasks import difficulty_of, shares_of, task_rows, verify

EASY = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}


def rows(name: str, held_out: bool = False, messages: bool = True, **options: Any) -> list[dict]:
    return task_rows(f"reasoning_gym:{name}", options, held_out=held_out, messages=messages)


def test_questions_are_shared_by_weight() -> None:
    mixed = shares_of("reasoning_gym:chain_sum*3 + gcd", {"size": 40, **EASY}, False)
    assert [(s.task, s.size, s.options) for s in mixed] == [
        ("chain_sum", 30, EASY["chain_sum"]),
        ("gcd", 10, {}),
    ]
    assert [s.size for s in shares_of("reasoning_gym:chain_sum+gcd", None, True)] == [32, 32]
    found = rows("chain_sum*3+gcd", size=40, **EASY)
    assert len(found) == 40 and {r["task"] for r in found} == {"chain_sum", "gcd"}
    assert "State the final answer" in found[0]["prompt"][0]["content"]
    assert isinstance(rows("gcd", messages=False, size=1)[0]["prompt"], str)


def test_seeds_decide_and_held_out_questions_are_others() -> None:
    ours, again = rows("gcd", size=20), rows("gcd", size=20)
    assert ours == again
    text = {r["prompt"][0]["content"] for r in ours}
    for other in (rows("gcd", size=20, seed=1), rows("gcd", held_out=True, held_out_size=20)):
        assert len(other) == 20 and not text & {r["prompt"][0]["content"] for r in other}


def test_the_verifier_judges_what_an_answer_says() -> None:
    found = rows("chain_sum", size=3, **EASY)
    right = [r["answer"] for r in found]
    columns = {k: [r[k] for r in found] for k in ("task", "task_index", "task_source", "answer")}
    said = [f"It is <answer> {right[0]} </answer>, or not?", right[1], "no idea"]
    assert verify(completions=said, **columns) == [1.0, 1.0, 0.0]
    chat = [[{"role": "assistant", "content": text}] for text in said]
    assert verify(completions=chat, **columns) == [1.0, 1.0, 0.0]
    twice = ["<answer>0</answer> then <answer>" + a + "</answer>" for a in right]
    assert verify(completions=twice, **columns) == [1.0, 1.0, 1.0]
    assert verify(completions=["", "<answer></answer>", " "], **columns) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("chain_smu", {}, "no such task. Did you mean 'chain_sum'"),
        ("gcd+gcd", {}, "named twice"),
        ("gcd*0", {}, "a weight above 0"),
        ("gcd*x", {}, "a weight above 0"),
        ("gcd", {"size": 0}, "whole number >= 1, got 0"),
        ("gcd", {"size": True}, "whole number"),
        ("gcd", {"chain_sum": {}}, "'chain_sum' is no task of"),
        ("gcd", {"gcd": {"min_number": 1}}, "no option 'min_number'. Did you mean 'min_numbers'"),
        ("gcd", {"gcd": 3}, "expected its options by name"),
        ("gcd", {"gcd": {"min_numbers": 9, "max_numbers": 2}}, "does not take"),
    ],
)
def test_what_cannot_be_asked_is_refused(name: str, options: dict, words: str) -> None:
    with pytest.raises(DataError, match=words.replace("'", ".")):
        rows(name, **options)


def test_a_run_on_a_task_needs_nothing_else(tmp_path: Path) -> None:
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=2, max_steps=1,
        prompts_per_step=2, max_completion_length=4, lora_r=4, dataset="reasoning_gym:gcd+dice",
        task_options={"size": 12, "held_out_size": 4}, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(tiny.model(), args=args, processing_class=tiny.tokenizer())
    assert len(trainer.data) == 12 and 0 < len(trainer.held_out) <= 4
    assert trainer.reward_funcs.names == ["reasoning_gym"]
    asked = {e.prompt for e in trainer.data.examples}
    assert not asked & {e.prompt for e in trainer.held_out.examples}
    trainer.train()
    records = Completions(tmp_path / "completions").read(1)
    assert len(records) == 4 and all(0 <= r["reward"] <= 1 for r in records)
    assert (tmp_path / "held_out").exists()


def test_the_verifier_wants_a_task(tmp_path: Path) -> None:
    args = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=2, max_steps=1,
        prompts_per_step=1, max_completion_length=4, reward_funcs=["reasoning_gym"],
    )  # fmt: skip
    trainer = GRPOTrainer(tiny.model(), args=args, train_dataset=[{"prompt": "w4"}],
                          processing_class=tiny.tokenizer())  # fmt: skip
    with pytest.raises(RewardError, match="the data has no task"):
        trainer.train()


def test_the_command_lists_them() -> None:
    said = CliRunner().invoke(app, ["tasks"]).output
    assert "arithmetic: " in said and "chain_sum" in said and " tasks. Options" in said
    one = CliRunner().invoke(app, ["tasks", "gcd"]).output
    assert "dataset: reasoning_gym:gcd" in one and one.count("\n-> ") == 2
    assert all(f"    {key}: " in one for key in difficulty_of("gcd"))
    assert json.dumps(difficulty_of("gcd"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("reasoning_gym"):
            raise ImportError("No module named 'reasoning_gym'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"pip install .fusedgrpo\[tasks\]"):
        rows("gcd")
