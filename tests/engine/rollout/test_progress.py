"""Rollouts tell how far they are: what is shown when, and that the counts are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.execution import Execution, Report, unwatched
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout import progress
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.progress import RolloutProgress
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.models.policy import Policy

PROMPTS = [[5, 6, 7, 8, 9], [4], [9, 9]]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0
        self.shown: list[tuple[float, str]] = []

    def __call__(self) -> float:
        return self.now

    def show(self, text: str) -> None:
        self.shown.append((self.now - 1000.0, text))

    def rollout(self, seconds: float, *, overwrites: bool, step: float = 0.125) -> None:
        """A token of each of 14 completions every ``step`` seconds, with 2 that wait."""
        with RolloutProgress(self.show, overwrites=overwrites, clock=self)() as report:
            for _ in range(int(seconds / step)):
                self.now += step
                report(14, 14, 2)


def test_a_line_comes_after_two_seconds_changes_twice_a_second_and_goes() -> None:
    clock = Clock()
    clock.rollout(4.125, overwrites=True)
    assert [at for at, _ in clock.shown] == [2.0, 2.5, 3.0, 3.5, 4.0, 4.125]
    assert clock.shown[0][1] == "sampling: 224 tokens, 14 live, 2 waiting, 112 tokens/s"
    assert clock.shown[-1][1] == ""
    clock.shown.clear()
    clock.rollout(1.9, overwrites=True)
    assert clock.shown == []


def test_a_log_has_few_lines_and_each_rollout_its_own_counts() -> None:
    clock = Clock()
    clock.rollout(29, overwrites=False)
    assert clock.shown == []
    clock.rollout(200, overwrites=False)
    assert [at for at, _ in clock.shown] == [59.0, 119.0, 179.0]
    assert clock.shown[1][1] == "sampling: 10,080 tokens, 14 live, 2 waiting, 112 tokens/s"


def test_a_line_goes_when_a_rollout_fails() -> None:
    clock = Clock()
    with (
        pytest.raises(KeyboardInterrupt),
        RolloutProgress(clock.show, overwrites=True, clock=clock)() as report,
    ):
        clock.now += 5
        report(1, 1, 0)
        raise KeyboardInterrupt
    assert clock.shown[-1] == (5.0, "")


class Recorded:
    def __init__(self) -> None:
        self.rollouts: list[list[tuple[int, int, int]]] = []

    @contextmanager
    def __call__(self) -> Iterator[Report]:
        self.rollouts.append([])
        yield lambda *counts: self.rollouts[-1].append(tuple(map(int, counts)))


def recorded(make: Callable[..., Any], in_flight: int) -> tuple[list[tuple[int, int, int]], int]:
    """What ``make``'s sampler reports of a rollout, and how many tokens there are in it."""
    seen = Recorded()
    execution = Execution(OOMRetry(0, in_flight))
    policy = Policy(tiny.model("Qwen2"))
    sampler = make(policy, tiny.tokenizer(), [tiny.EOS, 7, 20, 30], execution=execution)
    with execution.watched(seen):
        groups = sampler.sample(PROMPTS, 2, SamplingParams(max_new_tokens=30), 5)
    sampler.sample(PROMPTS, 2, SamplingParams(max_new_tokens=2), 5)
    assert len(seen.rollouts) == 1, "outside of watched nothing is told"
    return seen.rollouts[0], sum(len(c.ids) for group in groups for c in group.completions)


def test_the_decoder_counts_tokens_live_and_waiting() -> None:
    reports, tokens = recorded(DecoderSampler, 4)
    assert sum(count for count, _, _ in reports) == tokens
    assert reports[0] == (4, 4, 2) and reports[-1][1:] == (0, 0)
    assert all(live <= 4 for _, live, _ in reports)
    assert {waiting for _, _, waiting in reports} >= {2, 0}


def test_generate_counts_those_that_have_not_ended() -> None:
    reports, tokens = recorded(GenerateSampler, 4)
    assert sum(count for count, _, _ in reports) == tokens
    assert reports[0] == (4, 4, 2) and (2, 2, 0) in reports
    assert len({live for _, live, _ in reports}) > 2
    assert [waiting for _, _, waiting in reports] == sorted([w for *_, w in reports], reverse=True)


@pytest.mark.parametrize("sampler", ["decoder", "generate"])
def test_a_run_says_how_far_its_rollouts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, sampler: str
) -> None:
    monkeypatch.setattr(progress, "LOGGED", (0.0, 1e9))
    trainer = GRPOTrainer(
        model=tiny.model(),
        reward_funcs=lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"), num_generations=4, prompts_per_step=2, max_steps=2,
            max_completion_length=6, save_strategy="no", bf16=False, sampler=sampler,
        ),
        train_dataset=[{"prompt": "w5 w6"}, {"prompt": "w7"}],
        tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "sampling: " in line]
    assert len(said) == 2 and all(line.startswith("  sampling: 8 tokens, ") for line in said)
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("sampling: 8 tokens, ") == 2
    assert trainer.execution.progress is unwatched
