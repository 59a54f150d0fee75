"""TRL's rollout_func: whole completions from a function of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.rollout.types import Completion
from fusedgrpo.errors import ConfigError, SamplerError

PROMPTS = [{"prompt": f"w5 w{i}", "target": i} for i in range(6, 14)]
SEEN: list[dict[str, Any]] = []


def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
    """Three tokens after a prompt that has one more each time; the middle one was given."""
    device = trainer.model.device
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    draws = torch.randint(4, tiny.VOCAB, (len(prompts), 3), device=device).tolist()
    return {
        "prompt_ids": [[*own, *[20] * (i % 3)] for i, own in enumerate(ids)],
        "completion_ids": [[a, b, tiny.EOS if c % 2 else c] for a, b, c in draws],
        "logprobs": [[-1.0, 0.0, -2.0]] * len(prompts),
        "env_mask": [[1, 0, 1]] * len(prompts),
        "score": [float(a) for a, _, _ in draws],
    }


def reward(completions: list[str], score: list[float], target: list[int], **_: Any) -> list[float]:
    SEEN.append({"completions": completions, "score": score, "target": target})
    return [value / 40 for value in score]


def make(path: Path, function: Any = rollout, **changes: Any) -> GRPOTrainer:
    options: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 2,
        "num_generations": 4,
        "prompts_per_step": 2,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "held_out_check": False,
        "drift_check": False,
        "lora_target_modules": "all-linear",
    }
    return GRPOTrainer(
        model=tiny.model(),
        processing_class=tiny.tokenizer(),
        reward_funcs=reward,
        train_dataset=PROMPTS,
        eval_dataset=PROMPTS[:2],
        rollout_func=function,
        args=GRPOConfig(**options | changes),
    )


def completions(trainer: GRPOTrainer) -> list[Completion]:
    assert trainer.buffer is not None
    return list(trainer.buffer.rollout.completions())


def test_what_it_returns_is_trained_on(tmp_path: Path) -> None:
    SEEN.clear()
    trainer = make(tmp_path)
    row = trainer.step()
    (seen,) = SEEN
    said = completions(trainer)
    assert trainer.buffer is not None
    for g, group in enumerate(trainer.buffer.rollout.groups):
        encoded = trainer.processing_class(str(trainer.data.examples[group.row].prompt))
        assert list(group.prompt_ids) == encoded["input_ids"]
        for k, completion in enumerate(group.completions):
            more = (4 * g + k) % 3
            assert completion.ids[:more] == (20,) * more, "what is not shared is given"
            expected = ([(0, more)] if more else []) + [(more + 1, more + 2)]
            assert list(completion.given) == expected
            assert completion.logp is not None and completion.logp.tolist() == [-1.0, -2.0]
            assert (completion.finish_reason == "stop") == (completion.ids[-1] == tiny.EOS)
            assert seen["score"][4 * g + k] == completion.ids[more]
            assert seen["target"][4 * g + k] == group.row + 6
    assert seen["completions"] == [c.text for c in said]
    assert row["completions/mean_length"] == 2
    assert row["reward"] == pytest.approx(sum(seen["score"]) / 8 / 40)
    assert row["grad_norm"] > 0


def test_its_seed_is_the_runs(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a"), make(tmp_path / "b", seed=7)
    same = make(tmp_path / "c")
    for trainer in (one, other, same):
        trainer.step()
        torch.rand(3)  # somebody else's draws
        trainer.step()
    ids = [[c.ids for c in completions(trainer)] for trainer in (one, other, same)]
    assert ids[0] == ids[2] != ids[1]


def test_evaluation_and_dynamic_sampling_ask_it_too(tmp_path: Path) -> None:
    trainer = make(tmp_path, dynamic_sampling=True)
    row = trainer.step()
    assert row["dynamic_sampling/groups_kept"] == 2
    assert trainer.evaluate()["eval_completions/mean_length"] == 2


def changed(**changes: Any) -> Any:
    def function(prompts: list[str], trainer: Any) -> Any:
        output = rollout(prompts, trainer)
        for name, change in changes.items():
            output[name] = change(output.get(name))
            if output[name] is KeyError:
                del output[name]
        return output

    return function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda prompts, trainer: None, r"returned a NoneType, expected a dict"),
        (changed(logprobs=lambda _: KeyError), r"must return keys \['logprobs'\]"),
        (changed(completion_ids=lambda ids: ids[1:]), r"'completion_ids' has 7 values for 8"),
        (changed(score=lambda score: score[1:]), r"'score' has 7 values for 8"),
        (changed(completion_ids=lambda ids: [[], *ids[1:]]), r"completion_ids is \[\]"),
        (changed(completion_ids=lambda ids: [["a"], *ids[1:]]), r"expected a list of token ids"),
        (changed(completion_ids=lambda ids: [[400] * 3, *ids[1:]]), r"ids from 400 to 400.*has 40"),
        (changed(completion_ids=lambda ids: [[5] * 9, *ids[1:]]), r"9 tokens.*max_completion"),
        (changed(logprobs=lambda logp: [[-1.0], *logp[1:]]), r"logprobs has 1 values for 3 tokens"),
        (changed(env_mask=lambda mask: [[0, 0, 0], *mask[1:]]), r"no token that the policy wrote"),
        (changed(prompt_ids=lambda ids: [[30], *ids[1:]]), r"not even their first token in common"),
        (lambda prompts, trainer: 1 / 0, r"rollout_func failed: ZeroDivisionError"),
    ],
)  # fmt: skip
def test_what_is_no_rollout_is_refused(tmp_path: Path, function: Any, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        make(tmp_path, function).step()


def test_log_probs_and_mask_may_be_left_out(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, changed(logprobs=lambda _: None, env_mask=lambda _: KeyError), beta=0.1
    )
    row = trainer.step()
    assert all(c.logp is None for c in completions(trainer))
    assert row["completions/mean_length"] == 3 and row["kl"] == pytest.approx(0, abs=1e-6)


def test_one_of_them_makes_the_completions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout_func is 3, expected a function"):
        make(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"so do sampler: give one"):
        GRPOTrainer(
            model=tiny.model(),
            processing_class=tiny.tokenizer(),
            reward_funcs=reward,
            train_dataset=PROMPTS,
            rollout_func=rollout,
            sampler=type("Fixed", (), {"sample": lambda self: None})(),
            args=GRPOConfig(output_dir=str(tmp_path), bf16=False),
        )
