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
    "never right, and the form learned": Case(
        lambda s: run(
            s,
            {"accuracy": flat(0.0), "format": rise(0.1, 1.0)},
            held_out={"accuracy": flat(0.0), "format": rise(0.1, 1.0)},
            noise=0.0,
            evaluated_noise=0.0,
        ),
        "amber",
        {"style_only", "held_out"},
    ),
    "never right, and the form known from the beginning": Case(
        lambda s: run(
            s, {"accuracy": flat(0.0), "format": flat(1.0)}, noise=0.0, silent=flat(1.0)
        ),
        "red",
        {"too_hard"},
        frozenset({"too_easy"}),
    ),
    "all get the same small reward": Case(
        lambda s: run(s, flat(0.2), noise=0.0, silent=flat(1.0)), "red", {"too_hard"},
        frozenset({"too_easy"}),
    ),
    "all get the same reward, on a scale of its own": Case(
        lambda s: run(s, flat(20.0), noise=0.0, silent=flat(1.0)), "amber", {"silent"},
        frozenset({"too_easy", "too_hard"}),
    ),
    "held out, the sum of two stays where the one in training rose": Case(
        lambda s: run(
            s,
            {"accuracy": rise(0.3, 0.9), "format": flat(0.9)},
            held_out={"accuracy": flat(0.3), "format": flat(0.9)},
        ),
        "amber",
        {"held_out", "sum"},
    ),
    "harder prompts in training, better held out": Case(
        lambda s: run(
            s,
            {"accuracy": rise(0.6, 0.2), "format": rise(0.1, 0.9)},
            held_out={"accuracy": rise(0.3, 0.7), "format": rise(0.1, 0.9)},
        ),
        "amber",
        {"component", "held_out"},
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


def reasons(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {f.key: f"{f.text} {f.advice}" for f in judge(rows, LORA).reasons}


@pytest.mark.parametrize(
    ("rewards", "solved"),
    [
        ({"accuracy": 0.99}, True),
        ({"accuracy": 0.98, "format": 1.0}, True),
        ({"accuracy": 0.2, "format": 1.0}, False),
        ({"accuracy": 0.0}, False),
        ({"points": 400.0}, False),
        ({"penalty": -1.0}, False),
    ],
)
def test_prompts_are_solved_before_where_every_reward_is_nearly_one(
    rewards: dict[str, float], solved: bool
) -> None:
    held = {name: flat(value) for name, value in rewards.items()}
    found = reasons(run(0, held, held_out=held, noise=0.001, evaluated_noise=0.0001))
    assert ("They were solved before." in found["held_out"]) is solved


def test_groups_without_signal_at_the_end_are_told_apart() -> None:
    """Harder prompts are no advice to a run that no longer gets anything right."""
    learned = reasons(run(0, rise(0.3, 0.99), noise=0.01, silent=rise(0.3, 0.97)))["silent"]
    forgot = reasons(run(0, rise(0.4, 0.02), silent=rise(0.3, 0.97)))["silent"]
    assert "Harder prompts" in learned and "Harder prompts" not in forgot
    assert "half do" in forgot


def test_the_headline_does_not_call_worse_what_is_better_held_out() -> None:
    far = judge(run(0, rise(0.2, 0.6), held_out=rise(0.2, 0.6), kl=rise(0.0, 9.0)), LORA)
    assert far.kind == "red"
    assert far.headline == "Held-out prompts got better, but the run is not sound."
    lost = judge(
        run(
            0,
            {"accuracy": flat(0.5), "format": rise(0.1, 0.4)},
            held_out={"accuracy": rise(0.5, 0.1), "format": rise(0.1, 0.5)},
        ),
        LORA,
    )
    assert lost.kind == "red" and lost.headline == "The run got worse."


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


def test_each_reward_on_held_out_prompts_is_compared_one_by_one_too() -> None:
    """Two checks have no scatter of their own; 100 prompts of which 20 were lost say enough."""
    rows = [{"step": 1, "rewards/accuracy/mean": 0.5, "rewards/format/mean": 0.5}]

    def check(right: int, formed: int) -> list[dict[str, Any]]:
        parts = [{"accuracy": float(i < right), "format": float(i < formed)} for i in range(100)]
        return [
            {"row": i, "reward": sum(each.values()), "rewards": each}
            for i, each in enumerate(parts)
        ]

    found = judge(rows, {}, {0: check(50, 20), 20: check(30, 90)})
    (lost,) = [f for f in found.reasons if f.key == "held_out_component"]
    assert lost.level == "warning" and found.kind == "amber"
    assert lost.text.startswith("Held-out prompts: accuracy (greedy) fell: 0.500 to 0.300")
    assert "100 prompts" in lost.text


def test_large_changes_are_written_out() -> None:
    (found,) = judge(made([200.0, 300.0] * 10 + [900.0, 1000.0] * 10)).reasons
    assert "(+700 ± 145)" in found.text


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
        ("too easy", "too_easy", {"prompt_selection"}),
        ("one reward of two rose, and everything else broke", "length", {"beta", "learning_rate"}),
        ("falls", "sum", {"learning_rate"}),
    ],
)
def test_what_to_change_is_said_with_a_value(name: str, key: str, options: set[str]) -> None:
    found = {finding.key: finding for finding in judge(CASES[name].rows(0), LORA).advice}
    assert set(found[key].change) == options and found[key].advice
    assert found[key].steps is not None and found[key].steps[1] == STEPS


def test_a_sampler_that_is_not_the_policy_is_corrected_for() -> None:
    rows = run(0, rise(0.2, 0.7))
    for row in rows[1:]:
        row["sampling/sampling_logp_difference/mean"] = 0.4
    (found,) = (f for f in judge(rows, LORA).reasons if f.key == "mismatch")
    assert found.change == {"sampler_correction": True} and found.steps is not None


def test_a_reward_that_falls_is_no_loss_where_prompts_are_chosen() -> None:
    """Late prompts are harder ones; the same ones, held out, got better."""
    rows = run(0, {"accuracy": rise(0.8, 0.3), "style": rise(0.2, 0.6)},
               held_out={"accuracy": rise(0.3, 0.6), "style": rise(0.2, 0.6)})  # fmt: skip
    assert judge(rows, LORA).kind != "green"
    found = judge(rows, LORA | {"prompt_selection": "column:difficulty"})
    assert found.kind == "green"
    fell = next(f for f in found.reasons if f.key == "component")
    assert fell.level == "note" and "prompt_selection" in fell.text


def test_groups_that_dynamic_sampling_left_out_are_no_illness() -> None:
    def rows(kept: float) -> list[dict[str, Any]]:
        found = run(0, rise(0.2, 0.7), held_out=rise(0.2, 0.6), silent=flat(0.95))
        for row in found:
            if row["step"]:
                row |= {"dynamic_sampling/groups": 32.0, "dynamic_sampling/groups_kept": kept}
                row |= {"dynamic_sampling/rounds": 4.0}
        return found

    assert judge(rows(8.0), LORA).kind == "green"
    assert not any(f.key in ("silent", "too_hard") for f in judge(rows(8.0), LORA).reasons)
    (few,) = (f for f in judge(rows(2.0), LORA).reasons if f.key == "silent")
    assert "2.00 of the 8.00 groups" in few.text and "max_sampling_rounds" in few.advice
