"""Activations of a whole model from two small ones."""

from __future__ import annotations

from typing import Any

import pytest

from fusedgrpo.engine.config import GRPOConfig
from fusedgrpo.engine.memory_plan import DEPTHS
from fusedgrpo.models.memory import SmallModel, straight_line
from fusedgrpo.models.memory_stand_ins import Batch

LAYERS = 7


@pytest.fixture(scope="module")
def models() -> Any:
    from transformers import AutoConfig

    settings = AutoConfig.for_model(
        "qwen2", vocab_size=5000, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=2, dtype="bfloat16",
    )  # fmt: skip
    config = GRPOConfig(load_in_4bit=True)
    return {n: SmallModel(config, settings, n) for n in (*DEPTHS, LAYERS)}


@pytest.mark.parametrize("gradients", [True, False])
def test_two_depths_tell_all_others(models: Any, gradients: bool) -> None:
    batch = Batch(tokens=2000, keys=2500, scored=1800)

    def at(layers: int) -> Any:
        return models[layers].activations(batch, gradients=gradients)

    assert straight_line(at, *DEPTHS, LAYERS) == pytest.approx(at(LAYERS), rel=0.001)


def test_repeated_prompts_are_kept_per_key_until_the_layer_is_done(models: Any) -> None:
    few, many = (
        models[LAYERS].activations(Batch(4000, keys, 3000), gradients=True)
        for keys in (4000, 12000)
    )
    # keys and values, two heads of 32 in 16 bit; attention's backward may add to it
    assert many.layers_backward - few.layers_backward >= 8000 * 2 * 2 * 32 * 2
    assert many.head_forward == few.head_forward


def test_a_rollout_keeps_keys_and_values_of_all_layers(models: Any) -> None:
    found = models[LAYERS].rollout(rows=16, groups=2, prompt=50, length=300)
    assert found.entries == 16 * 300 * LAYERS * 2 * 2 * 32 * 2
