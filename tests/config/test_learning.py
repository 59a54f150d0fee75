"""The learning rate that nobody gave: which it is, that it is said, and when it is not."""

from __future__ import annotations

import pytest

from fusedgrpo import GRPOConfig
from fusedgrpo.config.learning import LEARNING_RATES, learning_rate, said, settle


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_follows_from_what_is_trained(kind: str) -> None:
    config = GRPOConfig(finetuning_type=kind)  # type: ignore[arg-type]
    assert learning_rate(config) == LEARNING_RATES[kind]
    settle(config, quietly=False)
    assert config.learning_rate == LEARNING_RATES[kind]
    # TRL's is no news.
    assert ("TRL's 1e-06" in said(config)) is (kind == "lora")


@pytest.mark.parametrize("given", [0.0, 5e-7, 1e-5])
def test_one_that_was_given_is_kept_and_not_talked_about(given: float) -> None:
    config = GRPOConfig(learning_rate=given)
    settle(config, quietly=False)
    assert config.learning_rate == learning_rate(config) == given
    assert said(config) == ""


def test_nothing_is_said_beside_an_optimizer_of_the_users_own() -> None:
    config = GRPOConfig()
    settle(config, quietly=True)
    assert said(config) == ""
