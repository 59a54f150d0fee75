"""Whole runs of a policy that calls tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import caller
import pytest
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.rollout.types import Completion
from fusedgrpo.errors import ConfigError, DataError, FusedGRPOError, ToolError
from fusedgrpo.models.packed_batch import Pair

Messages = list[dict[str, Any]]


def length(completions: list[Messages], **_: Any) -> list[float]:
    return [float(len(messages)) for messages in completions]


def options(path: Path, **changes: Any) -> GRPOConfig:
    given: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 2,
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 60,
        "max_tool_calling_iterations": 3,
        "learning_rate": 1e-2,
        "lora_target_modules": "all-linear",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "held_out_check": False,
        "drift_check": False,
        "report_to": "none",
    }
    return GRPOConfig(**given | changes)


def make(
    path: Path,
    tools: Any = (caller.double,),
    reward: Any = length,
    environment: Any = None,
    data: Any = None,
    **changes: Any,
) -> GRPOTrainer:
    return GRPOTrainer(
        model=caller.model(),
        processing_class=caller.tokenizer(),
        reward_funcs=reward,
        train_dataset=caller.PROMPTS if data is None else data,
        eval_dataset=None if data else caller.PROMPTS[:2],
        tools=list(tools) if tools else None,
        environment_factory=environment,
        args=options(path, **changes),
    )


def completions(trainer: GRPOTrainer) -> list[Completion]:
    assert trainer.buffer is not None
    return list(trainer.buffer.rollout.completions())


def policys_own(trainer: GRPOTrainer) -> torch.Tensor:
    """Log-probs of the buffer's tokens, each conversation forwarded in one piece, alone."""
    assert trainer.buffer is not None
    found = []
    policy = trainer.policy
    with policy.scoring():
        for group in trainer.buffer.rollout.groups:
            for c in group.completions:
                pair = Pair(group.prompt_ids, c.ids, c.given)
                found.append(policy.logprobs(policy.pack([pair])).logp)
    return torch.cat(found)


@pytest.mark.parametrize("sampler", ["decoder", "generate"])
def test_rewards_see_the_conversation_and_the_loss_what_the_policy_wrote(
    tmp_path: Path, sampler: str
) -> None:
    seen: list[Messages] = []

    whole: list[list[int]] = []

    def reward(
        completions: list[Messages], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        seen.extend(completions)
        whole.extend(completion_ids)
        return length(completions)

    trainer = make(tmp_path, reward=reward, sampler=sampler)
    row = trainer.step()
    said = completions(trainer)
    assert whole == [list(c.ids) for c in said]
    assert row["tools/call_frequency"] == sum(c.calls for c in said) / len(said) > 0.3
    assert 0 < row["tools/failure_frequency"] < 1
    assert row["completions/mean_length"] == sum(c.own_tokens for c in said) / len(said)
    assert seen == [list(c.messages or ()) for c in said]
    answered = 0
    for one in said:
        assert one.messages is not None
        roles = [message["role"] for message in one.messages]
        assert roles[0] == "assistant"
        assert len(one.given) == roles.count("tool") <= one.calls <= 3
        assert one.calls - len(one.given) <= 1, "the last answer had no room"
        calls = [m["tool_calls"][0]["function"] for m in one.messages if "tool_calls" in m]
        for message, before in zip(one.messages[1:], one.messages, strict=False):
            if message["role"] == "tool" and "tool_calls" in before:
                function = before["tool_calls"][0]["function"]
                if function["name"] == "double" and "x" in function["arguments"]:
                    assert message["content"] == str(2 * function["arguments"]["x"])
                    answered += 1
                else:
                    assert "error" in message["content"]
        assert calls or len(one.messages) == 1 or "error" in str(one.messages)
    assert answered > 2
    trainer.asking.close()


def test_a_conversation_is_sampled_as_it_is_scored(tmp_path: Path) -> None:
    """To 1e-5, in float32: each turn after keys and values that were kept, and in one piece."""
    trainer = make(tmp_path, steps_per_generation=2, beta=0.1, learning_rate=0.0)
    trainer.step()
    buffer = trainer.buffer
    assert buffer is not None and buffer.old_logp is not None and buffer.ref_logp is not None
    own = policys_own(trainer)
    sampled = torch.cat([c.logp for c in completions(trainer) if c.logp is not None])
    scored = ~buffer.old_logp.isnan()
    assert len(own) == len(sampled) == sum(c.own_tokens for c in completions(trainer))
    assert (own - sampled).abs().max() <= 1e-5
    assert (own - buffer.old_logp)[scored].abs().max() <= 1e-5
    assert (own - buffer.ref_logp)[scored].abs().max() <= 1e-5
    trainer.asking.close()


def test_a_run_that_goes_on_says_and_learns_the_same(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "beta": 0.05,
        "max_steps": 6,
        "save_steps": 3,
        "save_strategy": "steps",
    }
    whole = make(tmp_path / "whole", **changes)
    whole.train()
    part = make(tmp_path / "part", **changes)
    part.train()
    again = make(tmp_path / "part", **changes)
    again.train(str(tmp_path / "part" / "checkpoints" / "step-000003"))
    for trainer in (whole, part, again):
        trainer.asking.close()
    said = [[(c.ids, c.given, c.messages) for c in completions(t)] for t in (whole, part, again)]
    assert said[0] == said[1] == said[2]
    assert any(given for _, given, _ in said[0])
    for (name, one), (_, other) in zip(
        whole.policy.trainable(), again.policy.trainable(), strict=True
    ):
        assert torch.equal(one, other), name


def test_what_is_written_of_a_conversation(tmp_path: Path) -> None:
    trainer = make(tmp_path, drift_check=True, max_steps=1)
    trainer.train()
    trainer.asking.close()
    (path,) = (tmp_path / "completions").glob("*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["conversation"] for r in records] == [
        list(c.messages or ()) for c in completions(trainer)
    ]
    assert [r["tool_calls"] for r in records] == [c.calls for c in completions(trainer)]
    assert [r["length"] for r in records] == [c.own_tokens for c in completions(trainer)]
    (drift,) = (tmp_path / "drift").glob("*.jsonl")
    checked = [json.loads(line) for line in drift.read_text().splitlines()]
    assert any(r["given"] for r in checked)
    for record in checked:
        given = {t for start, stop in record["given"] for t in range(start, stop)}
        for name in ("before", "after"):
            unknown = {t for t, value in enumerate(record[name]) if value is None}
            assert len(record[name]) == len(record["tokens"]) and unknown == given


def test_with_dynamic_sampling_groups_are_scored_with_their_conversations(tmp_path: Path) -> None:
    sizes = []

    def reward(completions: list[Messages], **_: Any) -> list[float]:
        sizes.append(len(completions))
        return [float(any(m["role"] == "tool" for m in messages)) for messages in completions]

    streamed = make(tmp_path / "a", reward=reward, dynamic_sampling=True)
    row = streamed.step()
    assert set(sizes) == {4}, "each group by itself"
    assert row["dynamic_sampling/groups"] >= row["dynamic_sampling/groups_kept"] == 2
    assert row["tools/call_frequency"] > 0
    streamed.asking.close()


def test_evaluation_acts_as_well(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    one, other = trainer.evaluate(), trainer.evaluate()
    assert one["eval_tools/call_frequency"] == other["eval_tools/call_frequency"] > 0
    assert one["eval_reward"] == other["eval_reward"] > 1
    trainer.asking.close()


# --- environments -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["decoder", "generate"])
def test_each_completion_acts_in_an_environment_of_its_own(tmp_path: Path, sampler: str) -> None:
    seen: list[tuple[Messages, Any]] = []

    def reward(
        completions: list[Messages], environments: list[Any], answer: list[str], **_: Any
    ) -> list[float]:
        for messages, environment, row in zip(completions, environments, answer, strict=True):
            start = int(row) // 2
            calls = [m["tool_calls"][0]["function"] for m in messages if "tool_calls" in m]
            good = [c for c in calls if c["name"] == "double" and "x" in c["arguments"]]
            answers = [m["content"] for m in messages if m["role"] == "tool"]
            counts = [int(a) for a in answers if a.isdigit()]
            steps = [c["arguments"]["x"] for c in good][: len(counts)]
            assert counts == [start + sum(steps[: i + 1]) for i in range(len(steps))]
            assert environment.count == (counts[-1] if counts else start)
            seen.append((messages, environment))
        return [0.0] * len(completions)

    trainer = make(
        tmp_path, None, reward, caller.Counter, sampler=sampler, max_completion_length=80
    )
    assert trainer.reward_funcs.names == ["reward", "Counter"]
    row = trainer.step()
    assert len(seen) == 8 and any(environment.count for _, environment in seen)
    counted = [environment.count - environment.start for _, environment in seen]
    assert row["rewards/Counter/mean"] == pytest.approx(sum(counted) / 8)
    assert row["reward"] == pytest.approx(sum(counted) / 8)
    assert trainer.buffer is not None
    for group in trainer.buffer.rollout.groups:
        text = trainer.tokenizer.decode(group.prompt_ids)
        assert text.endswith("start <|im_end|> <|im_start|> assistant"), "what reset said"
        assert "tools: double" in text
    assert not trainer.asking.tools.processes._completions, "none is left open"  # type: ignore[union-attr]
    trainer.asking.close()


def test_rows_name_their_environment(tmp_path: Path) -> None:
    data = [
        {**row, "environment": "loud" if i % 2 else "quiet"} for i, row in enumerate(caller.PROMPTS)
    ]
    trainer = make(
        tmp_path,
        None,
        None,
        {"loud": caller.Counter, "quiet": caller.Quiet},
        data,
        prompts_per_step=4,
    )
    assert trainer.reward_funcs.names == ["Counter", "Quiet"]
    row = trainer.step()
    assert trainer.buffer is not None
    for group in trainer.buffer.rollout.groups:
        assert (" start " in trainer.tokenizer.decode(group.prompt_ids)) == bool(group.row % 2)
    assert row["rewards/Counter/mean"] is not None and row["rewards/Quiet/mean"] is not None
    trainer.asking.close()


def test_environments_that_begin_otherwise_for_each_completion_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, None, None, caller.Restless)
    with pytest.raises(ToolError, match=r"seeded alike"):
        trainer.step()
    trainer.asking.close()


# --- what is refused, before any work -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tools": [caller.undocumented]}, ConfigError, r"undocumented.*docstring"),
        ({"tools": ["nowhere.py:f"]}, FusedGRPOError, r"nowhere\.py"),
        ({"data": [{"prompt": "double 1"}]}, DataError, r"text_as_user_turn: true"),
        (
            {"environment": caller.undocumented, "tools": None},
            ConfigError,
            r"undocumented|environment",
        ),
    ],
    ids=["no docstring", "no file", "plain prompts", "no environment"],
)
def test_what_cannot_be_used_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(tmp_path, **changes)


def test_a_chat_template_that_leaves_tools_out_is_refused(tmp_path: Path) -> None:
    tokenizer = caller.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }} {% endif %}{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"chat template does not write calls.*response_template"):
        GRPOTrainer(
            model=caller.model(),
            processing_class=tokenizer,
            reward_funcs=length,
            train_dataset=caller.PROMPTS,
            tools=[caller.double],
            args=options(tmp_path),
        )


def test_tools_by_their_names_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def double(x: int) -> int:\n"
        '    """Twice a number.\n\n    Args:\n        x: the number.\n    """\n    return 2 * x\n'
    )
    trainer = (
        make(tmp_path / "run", None, tools_option=None)
        if False
        else GRPOTrainer(
            model=caller.model(),
            processing_class=caller.tokenizer(),
            reward_funcs=length,
            train_dataset=caller.PROMPTS,
            search_paths=[tmp_path],
            args=options(tmp_path / "run", tools=["mine.py:double"]),
        )
    )
    assert trainer.step()["tools/call_frequency"] > 0
    trainer.asking.close()


FILE = """
class Counter:
    def reset(self, answer, **row):
        self.count = 0

    def double(self, x: int) -> int:
        \'\'\'Count by a number.

        Args:
            x: the number.
        \'\'\'
        if x == 3:
            raise RuntimeError("three")
        self.count += x
        return self.count


def counted(completions, environments, **columns):
    return [float(environment.count) for environment in environments]
"""


def test_environments_and_rewards_by_their_names_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE.replace("\\'", "'"))
    trainer = by_name(tmp_path, "message")
    row = trainer.step()
    trainer.reward_funcs.close()
    trainer.asking.close()
    counts = []
    for completion in completions(trainer):
        answers = [m["content"] for m in completion.messages or () if m["role"] == "tool"]
        counts.append(max([int(a) for a in answers if a.isdigit()], default=0))
    assert row["rewards/counted/mean"] == sum(counts) / len(counts) > 0
    assert any("three" in str(c.messages) for c in completions(trainer)), "the policy was told"


def test_a_tool_that_fails_ends_the_run_if_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE.replace("\\'", "'"))
    trainer = by_name(tmp_path, "halt")
    with pytest.raises(ToolError, match=r"(?s)double.*three.*on_tool_error"):
        for _ in range(2):
            trainer.step()
    trainer.reward_funcs.close()
    trainer.asking.close()


def by_name(path: Path, on_error: str) -> GRPOTrainer:
    return GRPOTrainer(
        model=caller.model(),
        processing_class=caller.tokenizer(),
        train_dataset=caller.PROMPTS,
        search_paths=[path],
        args=options(
            path / "run",
            reward_funcs="mine.py:counted",
            environment_factory="mine.py:Counter",
            on_tool_error=on_error,
            num_generations=8,
        ),
    )


def test_a_call_beyond_the_limit_is_not_answered(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_tool_calling_iterations=1)
    trainer.step()
    assert max(c.calls for c in completions(trainer)) == 1
    last = [c.messages[-1] for c in completions(trainer) if c.messages and c.calls]
    assert any("tool_calls" in message for message in last), "one more call, unanswered"
    trainer.asking.close()


def test_what_an_evaluation_logs_has_what_the_environment_said_first(tmp_path: Path) -> None:
    trainer = make(tmp_path, None, None, caller.Counter, held_out_check=True, max_steps=1)
    trainer.train()
    trainer.asking.close()
    (path, *_) = sorted((tmp_path / "held_out").glob("*.jsonl"))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records and all(r["prompt"][-1]["content"].endswith(" start") for r in records)
    assert all(r["conversation"] for r in records)
