from __future__ import annotations

import pytest

from fusedgrpo.engine.reporting.advisor import Advisor, all_advice
from fusedgrpo.engine.reporting.judging import health
from tests.helpers.synthetic_runs import rise, run

GOOD = {"finetuning_type": "lora", "learning_rate": 1e-4, "max_completion_length": 64}


def rows(count, **values):
    return [{"step": step, **values} for step in range(1, count + 1)]


def observe(rows, config=GOOD, **options):
    advisor = Advisor(config, **options)
    return [note.text for row in rows for note in advisor.observe(row)]


def test_a_healthy_run_is_left_alone():
    healthy = [
        {
            "step": step,
            "loss": 0.02,
            "grad_norm": 0.5,
            "reward": step / 100,
            "frac_reward_zero_std": 0.4,
            "completions/clipped_ratio": 0.1,
        }
        for step in range(1, 101)
    ]
    assert all_advice(healthy, GOOD) == []


def test_a_loss_near_zero_is_explained_once():
    (text,) = observe(rows(20, loss=1e-6, grad_norm=0.3))
    assert "by design" in text
    assert "Watch reward and grad_norm" in text


@pytest.mark.parametrize("values", [{"loss": 0.5, "grad_norm": 0.3}, {"loss": 0, "grad_norm": 0}])
def test_a_loss_that_is_large_or_without_gradient_is_not_explained_away(values):
    assert observe(rows(5, **values)) == []


def test_truncated_completions_are_said_with_share_and_limit():
    (text,) = observe(rows(10, **{"completions/clipped_ratio": 0.75, "reward": 0.5}))
    assert "75% of the completions hit max_completion_length=64" in text
    assert "every reward is 0" not in text


def test_truncation_that_costs_every_reward_says_so_and_names_the_end_ids():
    stuck = rows(3, **{"completions/clipped_ratio": 1.0, "reward": 0.0})
    (text,) = observe(stuck, eos_token_ids=[2, 7])
    assert "100% of the completions hit" in text
    assert "every reward is 0" in text
    assert "end-of-sequence ids: 2, 7" in text


def test_rewards_that_cancel_out_or_are_unknown_are_not_called_zero():
    clipped = {"completions/clipped_ratio": 0.9}
    for values in ({}, {"reward": 0.0, "reward_std": 1.0}):
        (text,) = observe(rows(3, **clipped, **values))
        assert "every reward is 0" not in text


def test_two_truncated_steps_are_no_reason_yet():
    assert observe(rows(2, **{"completions/clipped_ratio": 1.0})) == []


def test_equal_rewards_are_said_after_five_steps_in_a_row():
    equal = {"frac_reward_zero_std": 1.0, "reward": 0.0}
    assert observe(rows(4, **equal)) == []
    (text,) = observe(rows(20, **equal))
    assert text.startswith("In every group all rewards were equal (mean reward 0)")
    assert "a right answer does get a reward" in text
    (text,) = observe(rows(5, frac_reward_zero_std=1.0, reward=1.0))
    assert "all solved" in text


def test_one_group_with_signal_breaks_the_row_of_equal_steps():
    mixed = rows(9, frac_reward_zero_std=1.0, reward=0.0)
    mixed[4]["frac_reward_zero_std"] = 0.5
    assert observe(mixed) == []


def test_few_groups_with_signal_are_said_with_their_share():
    (text,) = observe(rows(10, frac_reward_zero_std=0.9, reward=0.5))
    assert text.startswith("In 90% of the groups")


def test_a_flat_reward_is_said_after_fifty_rollouts_with_its_noise():
    noisy = rows(60, frac_reward_zero_std=0.5)
    for row in noisy:
        row["reward"] = 0.3 + 0.1 * (row["step"] % 2)
    (text,) = observe(noisy, {"finetuning_type": "lora", "learning_rate": 6e-6})
    assert "After 50 rollouts the reward has not risen" in text
    assert "learning_rate 6e-06 is low for LoRA" in text
    assert "Groups without signal: 50%" in text


def test_repeated_rows_of_one_rollout_do_not_count_as_rollouts():
    flat = rows(100, reward=0.5)
    for row in flat:
        row["time/sample"] = 1.0 if row["step"] % 4 == 1 else 0.0
    assert observe(flat) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"finetuning_type": "lora", "learning_rate": 5e-7}, True),
        ({"finetuning_type": "lora", "learning_rate": 2e-5}, False),
        ({"finetuning_type": "full", "learning_rate": 5e-7}, False),
    ],
)
def test_a_learning_rate_for_full_fine_tuning_is_said_before_the_first_step(config, said):
    texts = [note.dated for note in Advisor(config).start()]
    assert bool(texts) is said
    assert not said or "learning_rate 5e-07 is far too small for LoRA" in texts[0]


def test_several_end_ids_are_said():
    (note,) = Advisor(GOOD, eos_token_ids=[32007, 32000]).start()
    assert "2 end-of-sequence ids (32007, 32000)" in note.dated


def test_a_skipped_update_is_said():
    (text,) = all_advice([{"step": 8, "skipped_update": 1}], GOOD)
    assert text.startswith("step 8: The update was skipped")


def test_a_note_has_its_steps_ends_and_comes_back_with_others():
    cut_off = {*range(11, 21), 23, *range(41, 44)}  # one step without is no end
    clipped = [
        {"step": step, "completions/clipped_ratio": float(step in cut_off)} for step in range(1, 61)
    ]
    advisor = Advisor(GOOD)
    begun, ended, current = {}, {}, {}
    for row in clipped:
        step = row["step"]
        begun[step] = [note.dated.partition(":")[0] for note in advisor.observe(row)]
        ended[step] = [note.dated.partition(":")[0] for note in advisor.ended]
        current[step] = [note.dated.partition(":")[0] for note in advisor.current]
    assert {step: said for step, said in begun.items() if said} == {
        12: ["steps 10-12"],
        42: ["steps 40-42"],
    }
    assert {step: said for step, said in ended.items() if said} == {
        26: ["steps 10-21"],
        49: ["steps 40-44"],
    }
    assert current[11] == [] and current[15] == ["steps 10-15"] and current[27] == []
    assert [text.partition(":")[0] for text in all_advice(clipped, GOOD)] == [
        "steps 10-21",
        "steps 40-44",
    ]


def test_nulls_are_no_values():
    assert observe(rows(60, reward=None, loss=None, frac_reward_zero_std=None)) == []


def test_signs_of_illness_are_said_while_they_hold():
    """A reward that is lost to another, and an entropy that collapses and comes back."""
    hacked = run(0, {"accuracy": rise(0.6, 0.1), "brevity": rise(0.1, 1.0)}, steps=200)
    for row in hacked:
        row["entropy"] = 0.8 if row["step"] < 60 or row["step"] > 120 else 0.01
    advisor, begun, ended = Advisor(GOOD), {}, {}
    for row in hacked:
        begun |= {note.key: (row["step"], note) for note in advisor.observe(row)}
        ended |= {note.key: (row["step"], note) for note in advisor.ended}
    assert begun["component"][1].text.startswith("accuracy fell") and "component" not in ended
    assert "weigh accuracy more" in begun["component"][1].text
    assert 60 <= begun["entropy"][0] <= 70 and 120 < ended["entropy"][0] <= 160
    assert ended["entropy"][1].dated.startswith("steps ")
    # A report says once what its verdict says.
    texts = all_advice(hacked, GOOD, {"component"})
    assert not any("accuracy fell" in text for text in texts)
    assert any("entropy collapsed" in text for text in texts)


def test_signs_cost_little_in_a_long_run(monkeypatch):
    asked = []
    monkeypatch.setattr(health, "findings", lambda evidence: asked.append(len(evidence.rows)) or [])
    observe(rows(3000, reward=0.5, loss=0.1))
    assert asked[-1] > 2900 and len(asked) < 150


def test_what_a_verdict_says_of_the_options_is_not_said_again():
    low, flat = {**GOOD, "learning_rate": 5e-7}, rows(20, reward=0.5, loss=0.1)
    assert any("far too small for LoRA" in text for text in all_advice(flat, low))
    assert all_advice(flat, low, {"learning_rate"}) == []
