"""Intervals of rewards in training: as narrow as the prompts allow, and no narrower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fusedgrpo.engine.reporting.completions_reader import Scores
from fusedgrpo.engine.reporting.judging.bootstrap import PROMPTS, margin_over_prompts
from fusedgrpo.engine.reporting.judging.changes import of_training, window_of
from fusedgrpo.engine.reporting.judging.evidence import Evidence
from fusedgrpo.engine.reporting.judging.verdict import judge

STEPS = 40


def sampled(
    seed: int,
    *,
    pool: int,
    per_step: int = 8,
    group: int = 8,
    swing: float = 0.0,
    gain: float = 0.0,
) -> Scores:
    """Right or wrong answers to prompts that differ much, in shuffled passes over ``pool`` of them.
    swing: of the policy from step to step, a standard deviation. gain: over the run."""
    draw = np.random.default_rng(seed)
    prompts = STEPS * per_step
    order = np.concatenate([draw.permutation(pool) for _ in range(-(-prompts // pool))])[:prompts]
    row, step = np.repeat(order, group), np.repeat(np.arange(1, STEPS + 1), per_step * group)
    chance = np.clip(0.5 + draw.normal(0, 0.3, pool), 0.02, 0.98)[row] + gain * step / STEPS
    chance += draw.normal(0, swing, STEPS + 1)[step] if swing else 0.0
    right = (draw.random(len(row)) < chance).astype(float)
    nothing = np.zeros(len(row))
    return Scores(
        step=step, group=nothing, row=row, length=nothing, cut=nothing > 0, reward=right,
        advantage=nothing, parts={"accuracy": right},
    )  # fmt: skip


def rows_of(scores: Scores) -> list[dict[str, Any]]:
    means = [float(scores.reward[scores.step == step].mean()) for step in range(1, STEPS + 1)]
    return [
        {"step": step, "reward": mean, "rewards/accuracy/mean": mean}
        for step, mean in enumerate(means, start=1)
    ]


def margin(scores: Scores) -> float:
    window = window_of(STEPS)
    steps = list(range(1, STEPS + 1))
    found = margin_over_prompts(scores, scores.reward, steps[:window], steps[-window:])
    assert found is not None
    return found[0]


def false_alarms(monkeypatch: pytest.MonkeyPatch, **kind: Any) -> tuple[float, float]:
    """The share of 100 runs without any gain that are said to have changed; and the width of the
    intervals against those from step means."""
    monkeypatch.setattr("fusedgrpo.engine.reporting.judging.bootstrap.RESAMPLES", 1000)
    wrong, widths = 0, []
    for seed in range(100):
        scores = sampled(seed, **kind)
        rows = rows_of(scores)
        change = of_training(range(1, STEPS + 1), [row["reward"] for row in rows])
        assert change is not None
        of_prompts = margin(scores)
        wrong += abs(change.size) > of_prompts
        widths.append(of_prompts / change.margin)
    return wrong / 100, float(np.mean(widths))


def test_few_prompts_that_are_repeated_give_few_false_alarms_and_narrow_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong, width = false_alarms(monkeypatch, pool=16, per_step=4)
    assert wrong <= 0.03 and width < 0.6


def test_prompts_that_are_never_repeated_are_no_surer_than_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong, width = false_alarms(monkeypatch, pool=1000)
    assert wrong <= 0.03 and 0.7 < width < 1.1


def test_a_policy_that_swings_from_step_to_step_has_not_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many completions say so: prompts of a step share it."""
    wrong, _ = false_alarms(monkeypatch, pool=64, per_step=32, swing=0.1)
    assert wrong <= 0.03


def test_a_change_is_seen_that_step_means_hide() -> None:
    scores = sampled(1, pool=32, gain=0.12)
    rows = rows_of(scores)
    assert not Evidence(rows).sum.rose  # type: ignore[union-attr]
    evidence = Evidence(rows, scores=scores)
    assert evidence.sum is not None and evidence.sum.rose and evidence.sum.prompts == 32
    assert evidence.components["accuracy"].margin == evidence.sum.margin
    found = judge(rows, scores=scores)
    assert found.kind == "green" and ", 32 prompts)" in found.reasons[0].text
    assert judge(rows).kind == "amber"


def test_without_enough_prompts_or_scores_the_interval_is_that_of_step_means() -> None:
    scores = sampled(0, pool=32)
    rows = rows_of(scores)
    plain = Evidence(rows).sum
    for fewer in (
        sampled(0, pool=PROMPTS - 1),
        _without(scores, scores.step == STEPS),
        replace(scores, reward=np.where(scores.step == 2, np.nan, scores.reward)),
        _without(scores, scores.step > 0),
    ):
        assert Evidence(rows, scores=fewer).sum == plain
    known = Evidence(rows, scores=replace(scores, parts={}))
    assert known.sum != plain
    assert known.components == Evidence(rows).components
    # No interval is narrower than a hundredth of what the figure is about.
    same = replace(scores, reward=np.ones_like(scores.reward))
    certain = Evidence([row | {"reward": 1.0} for row in rows], scores=same).sum
    assert certain is not None and certain.margin == 0.01


def test_completions_without_a_reward_do_not_count() -> None:
    scores = sampled(0, pool=32)
    none = np.random.default_rng(0).random(len(scores)) < 0.3
    assert margin(replace(scores, reward=np.where(none, np.nan, scores.reward))) == margin(
        _without(scores, none)
    )


def _without(scores: Scores, left_out: np.ndarray) -> Scores:
    names = ("step", "group", "row", "length", "cut", "reward", "advantage")
    return Scores(
        **{name: getattr(scores, name)[~left_out] for name in names},
        parts={name: part[~left_out] for name, part in scores.parts.items()},
    )
