"""The bytes of weights that are planned, beside those of a model that was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.fake_layers import rounded
from fusedgrpo.engine.memory.measure import count_weights
from fusedgrpo.models.policy import Policy


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma2", "Phi3"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_plan_counts_the_weights_that_are_there(
    tmp_path: Path, pretended: Any, family: str, dtype: Any
) -> None:
    size = {"hidden_size": 64, "intermediate_size": 128}
    pretended(bfloat16=True)
    directory = tiny.save(tmp_path / "model", tiny.model(family, **size))
    options = GRPOConfig(model_name_or_path=str(directory), use_cpu=True, dtype=dtype)
    policy = Policy.load(options)
    there = [p for p in policy.model.parameters() if not p.requires_grad]
    planned = count_weights(options, policy.causal_lm.config)
    assert planned.embeddings_and_head + planned.other == sum(rounded(p.nbytes) for p in there)
    linear = sum(p.numel() for p in there if p.dtype == torch.bfloat16)
    assert (linear > 0.5 * sum(p.numel() for p in there)) == (dtype == "auto")
