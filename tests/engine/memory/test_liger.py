"""Liger's layers in the plan."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.fake_layers import Batch
from fusedgrpo.engine.memory.measure import SmallModel
from fusedgrpo.engine.memory.sizes import Sizes
from fusedgrpo.engine.memory.workload import Asked

pytest.importorskip("liger_kernel")

SIZES = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 32}


def settings() -> Any:
    found = tiny.model("Llama", **SIZES).config
    found.dtype = "bfloat16"
    return found


def config(**changes: Any) -> GRPOConfig:
    return GRPOConfig(bf16=True, **changes)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_an_update_takes_less_with_them(checkpointing: bool) -> None:
    batch = Batch(tokens=500, keys=600, scored=400, sequences=5)
    taken = {
        ligers: SmallModel(
            config(use_liger_kernel=ligers, gradient_checkpointing=checkpointing), settings(), 2
        ).activations(batch, gradients=True)
        for ligers in (False, True)
    }
    assert taken[True].layers_backward < taken[False].layers_backward
    if not checkpointing:
        # An MLP keeps silu(gate), a norm two rows in float32, beside what they keep here.
        assert taken[True].layers_forward < 0.8 * taken[False].layers_forward


def test_a_planner_does_not_mistake_one_for_the_other() -> None:
    sizes = Sizes(settings())
    of_option = {
        ligers: sizes.activations(Asked(config(use_liger_kernel=ligers), 100, None), 300, True)
        for ligers in (False, True)
    }
    of_part = sizes.activations(
        Asked(config(use_liger_kernel=True, liger_kernel_config={"swiglu": False}), 100, None),
        300,
        True,
    )
    assert len({of_option[False], of_option[True], of_part}) == 3


def test_rollouts_come_from_our_decoder_as_they_do_without_them() -> None:
    asked = Asked(config(use_liger_kernel=True), 10, None)
    assert Sizes(settings()).decodes(asked)
