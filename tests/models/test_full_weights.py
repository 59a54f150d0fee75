"""What a run of full fine-tuning saves loads as it is, and comes back bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

from fusedgrpo.errors import CheckpointError
from fusedgrpo.models import full_weights

IDS = torch.tensor([[5, 6, 7, 9]])
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": tiny.EOS,
    "pad_token_id": tiny.PAD,
}


def tied() -> Any:
    return tiny.model("Qwen2")


def resized() -> Any:
    model = tiny.model("Qwen2")
    model.resize_token_embeddings(tiny.VOCAB + 8)
    return model


def experts_in_one_tensor() -> Any:
    """They are saved one by one, as on the Hub."""
    torch.manual_seed(0)
    settings = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8
    )
    return transformers.Qwen3MoeForCausalLM(settings).eval()


def contradicting_generation_settings() -> Any:
    model = tiny.model()
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = False
    return model


def generation_settings_in_the_models() -> Any:
    model = tiny.model()
    model.config.temperature = 0.6
    return model


@pytest.mark.parametrize(
    "build",
    [
        tied,
        resized,
        experts_in_one_tensor,
        contradicting_generation_settings,
        generation_settings_in_the_models,
    ],
    ids=lambda build: build.__name__,
)
def test_saved_loaded_and_restored(build: Callable[[], Any], tmp_path: Path) -> None:
    model = build()
    tiny.stir(model)
    generation = model.generation_config.to_dict()
    full_weights.save(model, tmp_path / "model")
    assert model.generation_config.to_dict() == generation
    with torch.no_grad():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    again = build()
    full_weights.restore(again, tmp_path / "model")
    for (name, one), (_, other) in zip(
        again.named_parameters(), model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_generation_settings_are_written_as_they_came(tmp_path: Path) -> None:
    for build in (contradicting_generation_settings, generation_settings_in_the_models):
        model = build()
        full_weights.save(model, tmp_path / build.__name__)
        written = json.loads((tmp_path / build.__name__ / "generation_config.json").read_text())
        assert written["temperature"] == 0.6
    assert model.config.temperature == 0.6


def test_the_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    full_weights.save(tiny.model("Llama"), tmp_path / "model")
    with pytest.raises(CheckpointError, match="weights of another model"):
        full_weights.restore(tiny.model("Llama", num_hidden_layers=1), tmp_path / "model")
    with pytest.raises(CheckpointError, match="weights of another model"):
        full_weights.restore(tiny.model("Llama", num_hidden_layers=4), tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds no model weights"):
        full_weights.restore(tiny.model(), tmp_path / "nothing")
