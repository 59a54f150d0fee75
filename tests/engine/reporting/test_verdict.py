"""Runs of known kinds, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from fusedgrpo.engine.reporting.judging.verdict import judge
from tests.helpers.synthetic_runs import STEPS, flat, rise, run, up_and_down

LORA = {"finetuning_type": "lora", "learning_rate": 1e-5, "max_completion_length": 256}


class Case(NamedTuple):
    """keys: of findings that have to be among the reasons; not_keys: of those that must not."""

    rows: Callable[[int], list[dict[str, Any]]]
    kind: str
    keys: set[str]
    not_keys: frozenset[str] = frozenset()


SOLVED = {"silent": rise(0.3, 0.97), "entropy": rise(0.8, 0.01)}
CASES = {
    "healthy": Case(
        lambda s: run(s, rise(0.2, 0.7), held_out=rise(0.2, 0.6)), "green", {"held_out", "sum"}
    ),
    "healthy, nothing held out": Case(lambda s: run(s, rise(0.2, 0.7)), "green", {"sum"}),
    "healthy, two rewards": Case(
        lambda s: run(s, {"accuracy": rise(0.2, 0.6), "format": rise(0.3, 1.0)}), "green", {"sum"}
    ),
    "healthy, answers get longer": Case(
        lambda s: run(s, rise(0.2, 0.7), held_out=rise(0.2, 0.6), length=rise(100, 400)),
        "green",
        {"held_out"},
        frozenset({"length", "truncated"}),
    ),
    "solved, and the entropy with it": Case(
        lambda s: run(s, rise(0.3, 0.99), held_out=rise(0.3, 0.97), **SOLVED),
        "green",
        {"held_out"},
    ),
    "short answers that are all cut off, and right": Case(
        lambda s: run(s, rise(0.2, 0.9), held_out=rise(0.2, 0.9), clipped=flat(1.0)),
        "green",
        {"truncated"},
    ),
    "one reward of two rose, and everything else broke": Case(
        lambda s: run(
            s,
            {"accuracy": rise(0.5, 0.0), "brevity": rise(0.1, 1.0)},
            held_out={"accuracy": rise(0.5, 0.0), "brevity": rise(0.1, 0.2)},
            length=rise(100, 1),
            kl=rise(0.0, 8.0),
        ),
        "red",
        {"held_out", "component", "length", "kl"},
    ),
    "one component is lost on held-out prompts alone": Case(
        lambda s: run(
            s,
            {"accuracy": flat(0.5), "format": rise(0.1, 0.9)},
            held_out={"accuracy": rise(0.5, 0.1), "format": rise(0.1, 0.9)},
        ),
        "red",
        {"held_out", "held_out_component"},
    ),
    "hacked length": Case(
        lambda s: run(
            s, {"accuracy": flat(0.4), "length_bonus": rise(0.1, 1.0)}, length=rise(100, 900)
        ),
        "amber",
        {"style_only"},
    ),
    "one component falls": Case(
        lambda s: run(s, {"accuracy": rise(0.5, 0.4), "format": rise(0.1, 0.9)}, noise=0.04),
        "amber",
        {"component"},
    ),
    "one component is lost": Case(
        lambda s: run(s, {"accuracy": rise(0.5, 0.1), "format": rise(0.1, 0.9)}), "red",
        {"component"},
    ),
    "entropy collapses": Case(
        lambda s: run(s, rise(0.3, 0.45), entropy=rise(0.8, 0.005, 0.4)), "amber", {"entropy"}
    ),
    "KL explodes": Case(
        lambda s: run(s, rise(0.3, 0.5), kl=lambda t: 0.01 * 10 ** (3 * t)), "red", {"kl"}
    ),
    "KL grows too far": Case(
        lambda s: run(s, rise(0.3, 0.6), kl=rise(0.0, 2.0)), "amber", {"kl"}
    ),
    "all cut off, no reward": Case(
        lambda s: run(s, flat(0.0), noise=0.0, clipped=flat(1.0), silent=flat(1.0)),
        "red",
        {"truncated", "too_hard"},
    ),
    "all cut off in the end": Case(
        lambda s: run(s, rise(0.2, 0.4), clipped=rise(0.1, 0.9)), "amber", {"truncated"}
    ),
    "too easy": Case(
        lambda s: run(s, flat(0.98), noise=0.01, silent=flat(0.97)), "amber", {"too_easy"},
        frozenset({"too_hard"}),
    ),
    "too hard": Case(
        lambda s: run(s, flat(0.0), noise=0.0, silent=flat(1.0)),
        "red",
        {"too_hard"},
        frozenset({"too_easy"}),
    ),
    "too hard, below zero": Case(
        lambda s: run(s, flat(-1.0), noise=0.0, silent=flat(1.0)), "red", {"too_hard"}
    ),
    "NaN, recovered": Case(
        lambda s: run(s, rise(0.2, 0.7), held_out=rise(0.2, 0.6), skipped=(30, 31)),
        "green",
        {"skipped"},
    ),
    "NaN to the end": Case(
        lambda s: run(s, rise(0.2, 0.3, 0.3), skipped=tuple(range(40, STEPS + 1))), "red",
        {"skipped"},
    ),
    "overfitting, below the baseline": Case(
        lambda s: run(s, rise(0.3, 0.95), held_out=up_and_down(0.4, 0.5, 0.2)), "red", {"held_out"}
    ),
    "overfitting, above the baseline": Case(
        lambda s: run(s, rise(0.3, 0.95), held_out=up_and_down(0.3, 0.8, 0.5)),
        "amber",
        {"held_out", "peak"},
    ),
    "learned by heart": Case(
        lambda s: run(s, rise(0.3, 0.95), held_out=flat(0.4)), "amber", {"held_out"}
    ),
    "noise only": Case(lambda s: run(s, flat(0.4)), "amber", {"sum"}),
    "noise only, held out too": Case(
        lambda s: run(s, flat(0.4), held_out=flat(0.4)), "amber", {"sum", "held_out"}
    ),
    "rise, then fall to the beginning": Case(
        lambda s: run(s, up_and_down(0.2, 0.8, 0.2)), "red", {"peak"}
    ),
    "rise, then fall by half": Case(
        lambda s: run(s, up_and_down(0.2, 0.8, 0.5)), "amber", {"peak"}
    ),
    "rise, then fall below": Case(lambda s: run(s, up_and_down(0.5, 0.8, 0.1)), "red", {"sum"}),
    "falls": Case(lambda s: run(s, rise(0.7, 0.2)), "red", {"sum"}),
    "falls in training, better held out": Case(
        lambda s: run(s, rise(0.7, 0.5), held_out=rise(0.3, 0.6)), "amber", {"held_out", "sum"}
    ),
    "too short": Case(lambda s: run(s, rise(0.2, 0.9), steps=6), "unclear", set()),
    "short, but held out": Case(
        lambda s: run(s, rise(0.2, 0.9), held_out=rise(0.1, 0.9), steps=6, evaluations=2),
        "green",
        {"held_out"},
    ),
    "no gradient": Case(
        lambda s: run(s, flat(0.4), grad_norm=flat(0.0)), "amber", {"no_gradient"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_a_known_kind(name: str) -> None:
    case = CASES[name]
    wrong = []
    for seed in range(8):
        found = judge(case.rows(seed), LORA)
        keys = {finding.key for finding in found.reasons}
        if found.kind != case.kind or not case.keys <= keys or case.not_keys & keys:
            wrong.append(
                (seed, found.kind, [f"{f.level} {f.key}: {f.text}" for f in found.reasons])
            )
    # Each figure has an interval of 99%, and a run has several.
    assert len(wrong) <= 1, wrong[0]


def made(rewards: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"step": i, "reward": r, **more} for i, r in enumerate(rewards, start=1)]


def test_figures_have_their_steps_and_their_intervals() -> None:
    (found,) = judge(made([0.2, 0.3] * 10 + [0.9, 1.0] * 10)).reasons
    assert found.level == "good"
    assert found.text == (
        "Reward in training: 0.250 to 0.950 (+0.7 ± 0.14), steps 1 to 8 against steps 33 to 40."
    )


def test_repeated_rows_of_a_rollout_are_not_taken_for_evidence() -> None:
    rows = made([0.0] * 10 + [1.0] * 10)
    for i, row in enumerate(rows):
        row["time/sample"] = 1.0 if i % 10 == 0 else 0.0
    assert judge(rows).kind == "unclear"


def test_held_out_prompts_are_compared_one_by_one_where_they_are_known() -> None:
    """The interval of the differences is far below that of the means."""
    before = {row: row / 40 for row in range(40)}
    after = {row: value + 0.04 + 0.01 * (row % 3) for row, value in before.items()}

    def check(values: dict[int, float]) -> list[dict[str, Any]]:
        return [{"row": row, "reward": value, "rewards": {}} for row, value in values.items()]

    found = judge([], {}, {0: check(before), 20: check(after)})
    assert found.kind == "green"
    assert found.reasons[0].text.startswith("Held-out prompts, most likely answers: mean reward")
    assert "(+0.05 ± 0.0054, 40 prompts)" in found.reasons[0].text
    assert judge([], {}, {0: check(before)}).kind == "unclear"


def test_a_reward_that_weighs_nothing_or_is_a_penalty_is_read_as_such() -> None:
    rows = run(0, {"accuracy": rise(0.2, 0.6), "words": rise(0.9, 0.1)})
    assert judge(rows, LORA).kind == "red"
    for weight in (0.0, -1.0):
        for row in rows:
            row["reward"] = row["rewards/accuracy/mean"] + weight * row["rewards/words/mean"]
        assert judge(rows, LORA | {"reward_weights": [1.0, weight]}).kind == "green"


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("KL explodes", "kl", {"beta", "learning_rate"}),
        ("all cut off in the end", "truncated", {"max_completion_length"}),
        ("NaN to the end", "skipped", {"learning_rate"}),
        ("entropy collapses", "entropy", {"entropy_coef"}),
        ("too hard", "too_hard", {"num_generations"}),
        ("falls", "sum", {"learning_rate"}),
    ],
)
def test_what_to_change_is_said_with_a_value(name: str, key: str, options: set[str]) -> None:
    found = {finding.key: finding for finding in judge(CASES[name].rows(0), LORA).advice}
    assert set(found[key].change) == options and found[key].advice
    assert found[key].steps is not None and found[key].steps[1] == STEPS
