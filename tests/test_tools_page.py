"""The blocks of docs/tools.md run, and do what is said about them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import caller
import yaml
from transformers.utils import get_json_schema

from fusedgrpo import GRPOConfig, GRPOTrainer

TEXT = (Path(__file__).parents[1] / "docs" / "tools.md").read_text()
PYTHON = "\n\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S))


def names() -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "page"}
    exec(PYTHON, found)
    return found


def trainer(path: Path, **arguments: Any) -> GRPOTrainer:
    sizes: dict[str, Any] = {"num_generations": 4, "prompts_per_step": 2, "max_steps": 2}
    return GRPOTrainer(
        model=caller.model(),
        processing_class=caller.tokenizer(),
        train_dataset=caller.PROMPTS,
        args=GRPOConfig(
            output_dir=str(path / "run"),
            max_completion_length=60,
            bf16=False,
            **sizes | arguments.pop("options", {}),
        ),
        **arguments,
    )


def test_tools_and_rewards_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(PYTHON)
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.S)
    made = trainer(tmp_path, options=yaml.safe_load(text), search_paths=[tmp_path])
    row = made.step()
    made.reward_funcs.close()
    made.asking.close()
    assert row["tools/call_frequency"] > 0
    assert row["tools/failure_frequency"] == 1, "the policy calls what there is not"


def test_the_schema_and_the_reward() -> None:
    page = names()
    schema = get_json_schema(page["multiply"])["function"]
    assert schema["parameters"]["required"] == ["a", "b"]
    said = [
        [{"role": "assistant", "content": "12"}],
        [{"role": "assistant", "content": "", "tool_calls": []}, {"role": "tool", "content": "12"}],
    ]
    assert page["right_at_last"](said, ["12", "12"]) == [1.0, 0.0]


def test_the_environment(tmp_path: Path) -> None:
    made = trainer(tmp_path, reward_funcs=None, environment_factory=names()["GuessNumber"])
    assert made.reward_funcs.names == ["GuessNumber"]
    row = made.step()
    made.asking.close()
    assert row["rewards/GuessNumber/mean"] == 0, "it is called by no name that is known here"
    assert made.buffer is not None
    prompts = [made.tokenizer.decode(g.prompt_ids) for g in made.buffer.rollout.groups]
    assert all(prompt.count("<unk>") >= 2 or "is" in prompt for prompt in prompts)
    game = names()["GuessNumber"]()
    game.reset()
    assert game.get_reward() == 0
    answers = {game.guess(number) for number in range(1, 101)}
    assert answers == {"Too low.", "Too high.", "Right."} and 0 < game.get_reward() < 1
