"""Adapters go where they are trained, and nowhere else."""

from __future__ import annotations

from typing import Any

import hybrids
import pytest
import tiny
import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.models.adapters.lora import add_lora
from fusedgrpo.models.adapters.lora_targets import all_linear
from fusedgrpo.models.policy import Policy

PAIRS = [([5, 6, 7], [8, 9]), ([4], [10, 11, 12])]


def adapted(model: Any) -> set[str]:
    """The last names of the modules that got an adapter, all of which get a gradient."""
    wrapped = add_lora(model, GRPOConfig(lora_r=2))
    tiny.stir(wrapped)
    policy = Policy(wrapped.train())
    policy.logprobs(policy.pack(PAIRS)).logp.sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in policy.trainable())
    names = [n.partition(".lora_A")[0] for n, _ in policy.trainable() if ".lora_A" in n]
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_all_linear_is_what_peft_takes_it_to_be(family: str) -> None:
    assert all_linear(tiny.model(family)) == "all-linear"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        # Fused kernels and the slow path read the weights of the others.
        ("Mamba", {"in_proj"}),
        ("Mamba2", {"in_proj"}),
        ("Nemotron-H", {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}),
    ],
)
def test_layers_that_are_read_and_not_called_are_left_out(family: str, expected: set[str]) -> None:
    assert adapted(hybrids.model(family)) == expected


def test_the_vision_tower_of_a_model_that_sees_text_only_is_left_out() -> None:
    import transformers

    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=tiny.model("Gemma3").config.to_dict(),
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
            mm_tokens_per_image=1,
            image_token_index=39,
            boi_token_index=38,
            eoi_token_index=37,
        )
    ).eval()
    wrapped = add_lora(model, GRPOConfig(lora_r=2))
    names = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2 and all("language_model" in name for name in names)
