from __future__ import annotations

import json
import math

import torch

from fusedgrpo.engine.reporting.completions_log import (
    CompletionsLog,
    completion_records,
    completion_text,
)
from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.engine.rollout.types import Completion, Group, Rollout


def make_records(**changes):
    rollout = Rollout(
        groups=(
            Group(row=4, prompt_ids=(1,), completions=(Completion((5, 6), "算 a", "stop"),)),
            Group(row=9, prompt_ids=(1,), completions=(Completion((7,), "b", "length"),)),
        )
    )
    arguments = {
        "prompts": ["p", [{"role": "user", "content": "q"}]],
        "names": ["accuracy", "format"],
        "rewards": torch.tensor([[1.0, math.nan], [0.0, 0.5]]),
        "total": torch.tensor([1.0, 0.5]),
        "advantages": torch.tensor([0.25, -0.25]),
        "extra": {"parsed": [None, "x"]},
    }
    return completion_records(rollout, **{**arguments, **changes})


def test_records_hold_everything_about_a_completion():
    first, second = make_records()
    assert first == {
        "group": 0,
        "row": 4,
        "prompt": "p",
        "completion": "算 a",
        "finish_reason": "stop",
        "length": 2,
        "rewards": {"accuracy": 1.0, "format": None},
        "reward": 1.0,
        "advantage": 0.25,
        "extra": {"parsed": None},
    }
    assert (second["group"], second["row"], second["finish_reason"]) == (1, 9, "length")
    assert second["extra"] == {"parsed": "x"}


def test_two_functions_of_one_name_keep_both_values():
    first, _ = make_records(
        names=["accuracy", "accuracy"], rewards=torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    )
    assert first["rewards"] == {"accuracy": 1.0, "accuracy#2": 0.5}


def test_a_conversation_is_told_with_its_calls():
    call = {"type": "function", "function": {"name": "double", "arguments": {"x": "é"}}}
    record = {
        "completion": "raw",
        "conversation": [
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
            {"role": "tool", "name": "double", "content": "4"},
            {"role": "assistant", "content": "It is 4."},
        ],
    }
    assert completion_text(record).splitlines() == [
        "assistant thinks: hm",
        'assistant calls double {"x": "é"}',
        "tool double: 4",
        "assistant: It is 4.",
    ]
    assert completion_text({"completion": "raw"}) == "raw"
    for nonsense in ("text", [3], [{"tool_calls": 3}], [{"tool_calls": [3, {"function": 4}]}]):
        completion_text({"conversation": nonsense, "completion": None})


def test_one_strict_json_file_per_rollout(tmp_path):
    path = CompletionsLog(tmp_path / "completions").write(12, make_records())
    assert path.name == "step-000012.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [12, 12]
    assert rows[1]["prompt"] == [{"role": "user", "content": "q"}]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_first_and_last_by_number_also_beyond_six_digits(tmp_path):
    log = CompletionsLog(tmp_path)
    assert Completions(tmp_path).steps == []
    for step in (999999, 1000000, 2):
        log.write(step, make_records())
    found = Completions(tmp_path)
    first, last = (found.read(found.steps[i]) for i in (0, -1))
    assert first[0]["step"] == 2
    assert last[0]["step"] == 1000000
