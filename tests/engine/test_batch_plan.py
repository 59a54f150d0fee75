from __future__ import annotations

import math

import pytest

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import decoded_together, resolve_batch
from fusedgrpo.errors import ConfigError


def test_the_recipe_asks_for_four_completions_and_gets_one_prompt_of_eight() -> None:
    config = GRPOConfig(
        per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=1
    )
    plan = resolve_batch(config, num_prompts=2)
    assert (plan.groups_per_step, plan.groups_per_rollout, plan.total_steps) == (1, 1, 2)
    assert plan.describe() == (
        "1 prompt x 8 completions per step (asked for 4 completions, rounded up to whole groups); "
        "2 steps = 1 epoch of 2 prompts"
    )


def test_whole_groups_are_not_called_rounded() -> None:
    config = GRPOConfig(gradient_accumulation_steps=2, num_train_epochs=2)
    assert resolve_batch(config, 10).describe() == (
        "2 prompts x 8 completions per step; 10 steps = 2 epochs of 10 prompts"
    )


@pytest.mark.parametrize("batch", range(1, 26))
@pytest.mark.parametrize("group", [2, 7, 8])
def test_any_batch_size_holds_at_least_what_was_asked_for(batch: int, group: int) -> None:
    plan = resolve_batch(
        GRPOConfig(per_device_train_batch_size=batch, num_generations=group), num_prompts=5
    )
    assert batch <= plan.completions_per_step < batch + group


def test_prompts_per_step_is_taken_at_its_word() -> None:
    plan = resolve_batch(GRPOConfig(prompts_per_step=3, per_device_train_batch_size=100), 9)
    assert plan.groups_per_step == 3
    assert plan.describe().startswith("3 prompts x 8 completions per step; ")


def test_processes_multiply_the_batch() -> None:
    assert resolve_batch(GRPOConfig(), 100, world_size=4).groups_per_step == 4


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ({}, 2),
        ({"steps_per_generation": 10}, 10),
        ({"generation_batch_size": 41}, 6),
        # Less than a step: the policy does not change within a step, so sample for all of it.
        ({"steps_per_generation": 1}, 2),
        ({"generation_batch_size": 1}, 2),
    ],
)
def test_groups_per_rollout(options: dict[str, int], groups: int) -> None:
    plan = resolve_batch(GRPOConfig(gradient_accumulation_steps=2, **options), 100)
    assert plan.groups_per_rollout == groups
    assert plan.steps_per_rollout == math.ceil(groups / 2)


@pytest.mark.parametrize("num_prompts", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("epochs", [0.1, 0.5, 1, 3])
@pytest.mark.parametrize("rollout", [2, 5])
@pytest.mark.parametrize("iterations", [1, 2])
def test_total_steps_counts_the_last_short_rollout_exactly(
    num_prompts: int, epochs: float, rollout: int, iterations: int
) -> None:
    config = GRPOConfig(
        prompts_per_step=2,
        generation_batch_size=8 * rollout,
        num_train_epochs=epochs,
        num_iterations=iterations,
    )
    plan = resolve_batch(config, num_prompts)
    left, steps = plan.total_prompts or 0, 0
    while left > 0:
        sampled = min(left, plan.groups_per_rollout)
        left -= sampled
        for _ in range(iterations):
            steps += len(range(0, sampled, plan.groups_per_step))
    assert plan.total_steps == steps


def test_decimal_epochs_are_exact() -> None:
    assert resolve_batch(GRPOConfig(num_train_epochs=0.1), 30).total_prompts == 3


def test_max_steps_is_the_number_of_steps() -> None:
    config = GRPOConfig(prompts_per_step=2, max_steps=25, num_iterations=2, steps_per_generation=4)
    plan = resolve_batch(config, 10)
    assert (plan.total_prompts, plan.total_steps) == (None, 25)
    assert plan.describe() == (
        "2 prompts x 8 completions per step; 4 prompts sampled at once for 4 steps (2 passes over "
        "them); 25 steps = 2.8 epochs of 10 prompts"
    )


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="no training prompts"):
        resolve_batch(GRPOConfig(), 0)


@pytest.mark.parametrize(
    ("rows", "n", "expected"), [(16, 4, 16), (7, 4, 4), (4, 4, 4), (3, 4, 3), (1, 4, 1), (9, 1, 9)]
)
def test_whole_groups_are_decoded_together_if_one_fits(rows: int, n: int, expected: int) -> None:
    assert decoded_together(rows, n) == expected
