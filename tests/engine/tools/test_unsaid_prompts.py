"""Environments that say the whole prompt: runs without data, and rows without a prompt."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import asker
import caller
import pytest

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.data.unsaid import MOST_ROWS
from fusedgrpo.errors import ConfigError, DataError

Messages = list[dict[str, Any]]
EMPTY = [{"role": "user", "content": ""}]


def make(path: Path, environment: Any, data: Any = None, reward: Any = None, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 2,
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 40,
        "lora_target_modules": "all-linear",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "held_out_check": False,
        "drift_check": False,
        "report_to": "none",
    }
    return GRPOTrainer(
        model=caller.model(),
        processing_class=caller.tokenizer(),
        reward_funcs=reward,
        train_dataset=data,
        environment_factory=environment,
        args=GRPOConfig(**options | changes),
    )


def prompts(trainer: GRPOTrainer) -> list[str]:
    assert trainer.buffer is not None
    return [trainer.tokenizer.decode(g.prompt_ids) for g in trainer.buffer.rollout.groups]


def test_without_data_the_environment_says_all_prompts(tmp_path: Path) -> None:
    seen: list[tuple[Messages, Any]] = []

    def reward(prompts: list[Messages], environments: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, environments, strict=True))
        return [0.0] * len(prompts)

    trainer = make(tmp_path, asker.Asker, reward=reward)
    assert len(trainer.data) == 4, "a row for each prompt of the run"
    trainer.train()
    asked = []
    for messages, environment in seen:
        assert environment.given == {"prompt": EMPTY}
        assert messages == [{"role": "user", "content": environment.asked}]
        asked.append(environment.asked)
    groups = [set(asked[i : i + 4]) for i in range(0, len(asked), 4)]
    assert len(groups) == 4 and all(len(group) == 1 for group in groups), "one prompt for a group"
    assert len(set.union(*groups)) > 1
    for text, words in zip(prompts(trainer), asked[-8::4], strict=True):
        assert f"user {words} <|im_end|>" in text
    trainer.asking.close()


def test_rows_without_a_prompt_are_columns_for_reset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = [{"number": i} for i in range(4)]
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        trainer = make(tmp_path, asker.Reader, data, shuffle_dataset=False)
    assert "no column 'prompt'" in caplog.text and "'number'" in caplog.text
    row = trainer.step()
    for number, text in enumerate(prompts(trainer)):
        assert f"user double {number} <|im_end|>" in text
    assert row["rewards/Reader/mean"] is not None
    trainer.asking.close()


def test_without_environments_a_prompt_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'prompt'"):
        make(tmp_path, None, [{"number": 1}], reward=lambda completions, **_: [0.0])


def test_each_reset_is_given_the_prompt_of_the_row(tmp_path: Path) -> None:
    """Not the one with what another reset has said to it."""
    trainer = make(tmp_path, asker.Measurer, caller.PROMPTS)
    trainer.step()  # which refuses environments of one prompt that begin otherwise
    assert all("2 <|im_end|>" in text for text in prompts(trainer))
    trainer.asking.close()


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        (None, {}, r"`train_dataset` is required"),
        ({"a": asker.Asker, "b": caller.Quiet}, {}, r"requires a `train_dataset`.*'a', 'b'"),
        (asker.Asker, {"max_steps": -1}, r"max_steps"),
    ],
    ids=["no environment", "several", "no end"],
)
def test_prompts_that_nobody_says_are_refused(
    tmp_path: Path, environment: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, environment, reward=lambda completions, **_: [0.0], **changes)


def test_a_long_run_has_few_rows(tmp_path: Path) -> None:
    trainer = make(tmp_path, asker.Asker, max_steps=100_000)
    assert len(trainer.data) == MOST_ROWS
    trainer.asking.close()


def test_what_a_trainer_says_of_its_tools(tmp_path: Path) -> None:
    trainer = make(tmp_path, asker.Asker, reward=lambda completions, **_: [0.0] * len(completions))
    assert [tool.__name__ for tool in trainer.tools] == ["double"]
    assert len(trainer.reward_funcs) == 2 and trainer.reward_func_names[1] == "Asker"
    with pytest.raises(AttributeError, match=r"`environments` is given copies"):
        trainer.environments  # noqa: B018
    trainer.asking.close()
