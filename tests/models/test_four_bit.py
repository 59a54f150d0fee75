"""4-bit models keep their gradients on every CPU, however they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ModelError
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy

pytest.importorskip("bitsandbytes")
PAIRS = [([5, 6, 7], [8, 9, 10]), ([5, 6, 7], [11, 9])]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # bitsandbytes repacks layers of whole blocks of 32 rows.
    model = tiny.model("Llama", hidden_size=64, intermediate_size=64, num_key_value_heads=2)
    return tiny.save(tmp_path_factory.mktemp("model"), model)


@pytest.fixture(params=[False, True], ids=["plain CPU", "CPU with bfloat16"])
def repacks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether bitsandbytes thinks that the CPU has the instructions for which it repacks."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return request.param


def config(**options: Any) -> GRPOConfig:
    return GRPOConfig(**{"bf16": False, "use_cpu": True} | options)


def loaded_by_hand(saved: Path, nested: bool = True) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, quantization_config=four_bit, device_map="cpu"
    )


def by_name(saved: Path) -> Policy:
    return Policy.load(config(model_name_or_path=str(saved), load_in_4bit=True, lora_r=4))


def as_an_object(saved: Path) -> Policy:
    return Policy.load(config(lora_r=4), loaded_by_hand(saved))


def under_an_adapter(saved: Path) -> Policy:
    return Policy.load(config(), tiny.add_lora(loaded_by_hand(saved, nested=False)))


def without_loading(saved: Path) -> Policy:
    return Policy(tiny.add_lora(loaded_by_hand(saved)))


@pytest.mark.parametrize("made", [by_name, as_an_object, under_an_adapter, without_loading])
def test_gradients_are_those_of_finite_differences(repacks: bool, saved: Path, made: Any) -> None:
    policy = made(saved)
    tiny.stir(policy.model, 0.05)
    packed = PackedBatch.build(PAIRS, policy.device, policy.layout)
    with policy.scoring():
        before = policy.logprobs(packed).logp
    with policy.training():
        policy.logprobs(packed).logp.sum().backward()
    first = [p for n, p in policy.trainable() if "layers.0." in n and "lora_A" in n]
    assert first
    direction = [torch.randn_like(p) for p in first]
    gradients = sum(float((p.grad * d).sum()) for p, d in zip(first, direction, strict=True))

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(first, direction, strict=True):
                p.add_(d, alpha=step)
        with policy.scoring():
            total = policy.logprobs(packed).logp.double().sum().item()
        with torch.no_grad():
            for p, d in zip(first, direction, strict=True):
                p.sub_(d, alpha=step)
        return total

    differences = (moved(1e-3) - moved(-1e-3)) / 2e-3
    assert gradients == pytest.approx(differences, rel=0.02)
    with policy.scoring():
        torch.testing.assert_close(policy.logprobs(packed).logp, before, atol=1e-4, rtol=0)


def test_the_numbers_are_those_of_every_other_cpu(saved: Path, monkeypatch) -> None:
    found = []
    for answer in (False, True):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda a=answer: a)
        policy = by_name(saved)
        with policy.scoring():
            found.append(policy.logprobs(policy.pack(PAIRS)).logp)
    assert torch.equal(*found)


@pytest.mark.parametrize("wrap", [lambda m: m, tiny.add_lora], ids=["bare", "with an adapter"])
def test_a_model_that_was_repacked_before_is_refused_by_layer(saved, monkeypatch, wrap) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = loaded_by_hand(saved).eval()
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer(torch.zeros(1, 64))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.q_proj.*Load the model anew"):
        Policy.load(config(), wrap(model))
