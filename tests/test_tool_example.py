"""The calculator of examples/tools: its files fit one another, and a run with them takes a step."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import tool_chats
import yaml
from typer.testing import CliRunner

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.cli import app
from fusedgrpo.engine.tools.calls import TurnParser
from fusedgrpo.engine.tools.rendering import ToolTurns
from fusedgrpo.engine.tools.types import ToolCall

FOLDER = Path(__file__).parents[1] / "examples/tools"
CONFIG = FOLDER / "calculator.yaml"
TEMPLATE = (FOLDER / "chat_template.jinja").read_text()


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prepared(tmp_path: Path) -> dict[str, Any]:
    """The example's options with a tiny model of one token a byte in the place of its own."""
    load("prepare").write_questions(tmp_path)
    tokenizer = tool_chats.tokenizer(TEMPLATE, eos_token="<|im_end|>", pad_token="<eos>")
    model = tiny.model(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
    )
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "tokenizer_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "train.jsonl"),
        "eval_dataset": str(tmp_path / "held_out.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_samples": 8,
        "max_completion_length": 8,
    }


def test_one_step_of_it(prepared: dict[str, Any]) -> None:
    given = yaml.safe_load(CONFIG.read_text()) | prepared | {"max_steps": 1}
    trainer = GRPOTrainer(args=GRPOConfig(**given), search_paths=[FOLDER])
    assert trainer.asking.tools is not None
    assert trainer.asking.tools.tools.names() == ["multiply"]
    trainer.train()
    trainer.asking.close()
    metrics = json.loads((Path(given["output_dir"]) / "metrics.jsonl").read_text())
    assert metrics["reward"] == 0.0, "a random model multiplies nothing"
    assert metrics["tools/call_frequency"] == 0.0


def test_a_dry_run_says_what_its_tools_are(prepared: dict[str, Any]) -> None:
    options = [word for name, value in prepared.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["train", str(CONFIG), *options, "--dry_run"])
    assert done.exit_code == 0, done.output
    assert "tools       multiply\n" in done.output
    assert "rewards     right_product x 1\n" in done.output


def test_its_calls_are_read_and_answered() -> None:
    chat = tool_chats.chat(TEMPLATE)
    parser, end = TurnParser(chat), tool_chats.token(chat, "<|im_end|>")
    *_, call = load("prepare").WORKED[:2]
    before = chat.text(load("prepare").WORKED[:1])
    written = chat.text([load("prepare").WORKED[0], call], generation_prompt=False)
    turn = tool_chats.ids(chat, written.removeprefix(before))
    assert parser.parse(turn, ()).calls == (ToolCall("multiply", {"a": 12, "b": 34}),)
    answer = {"role": "tool", "name": "multiply", "content": "408"}
    suffix = ToolTurns(chat, [end]).suffix([answer], end)
    assert chat.tokenizer.decode(suffix) == (
        "\n<|im_start|>tool\n408<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_held_out_product_is_trained(tmp_path: Path) -> None:
    load("prepare").write_questions(tmp_path)
    products = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    asked = {name: {r["prompt"][-1]["content"] for r in rows} for name, rows in products.items()}
    assert asked["train"].isdisjoint(asked["held_out"]) and len(asked["held_out"]) == 20


def test_what_is_a_right_product() -> None:
    right = load("calculator").right_product
    said = ["57 times 43 is 2,451.", "2451", "57", "", "2451 is 57 times 43"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert right(completions, [2451] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    asked = {"role": "assistant", "content": "", "tool_calls": []}
    assert right([[asked, {"role": "tool", "content": "2451"}]], [2451]) == [0.0]
