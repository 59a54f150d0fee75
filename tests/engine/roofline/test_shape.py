"""The shape of a model as the roofline takes it, and models that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import transformers

from fusedgrpo import GRPOConfig
from fusedgrpo.engine.memory.bare_models import adapted_model
from fusedgrpo.engine.roofline.cards import CARDS, find_card
from fusedgrpo.engine.roofline.shape import Attention, Shape, UnknownShapeError


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_matrix_of_a_family_is_counted(family: str) -> None:
    model = tiny.model(family)
    shape = Shape.of(model, 4)
    matrices = {n: p for n, p in model.get_decoder().named_parameters() if p.dim() > 1}
    embeddings = model.get_input_embeddings().weight.numel()
    assert sum(p.weights for p in shape.products) == (
        sum(p.numel() for p in matrices.values()) - embeddings
    )
    assert sum(p.closes for p in shape.products) == len(shape.attention) == 2
    assert (shape.vocabulary, shape.hidden) == (tiny.VOCAB, 16)


def test_windows_are_those_of_the_layers() -> None:
    assert [a.window for a in Shape.of(tiny.model("Gemma3"), 4).attention] == [4, None]
    assert [a.window for a in Shape.of(tiny.model("Mistral"), 4).attention] == [4, 4]
    assert Shape.of(tiny.model("Qwen3"), 2).attention[0] == Attention(16, 16)


def test_the_adapter_trains_and_the_first_q_k_v_pass_nothing_on() -> None:
    built = tiny.add_lora(tiny.model("Llama"), r=3)
    shape = Shape.of(built.get_base_model(), 4)
    trained = sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert sum(p.factors for p in shape.products) == trained
    assert [p.passes_on for p in shape.products] == [False] * 3 + [True] * 11
    assert sum(p.factors for p in shape.without_adapter().products) == 0
    assert sum(p.factor_bytes for p in shape.beside().products) == 4 * trained
    full = Shape.of(tiny.model("Llama"), 4)
    assert all(p.passes_on and p.trains for p in full.products) and full.head_trains


def test_from_a_configuration_as_from_the_model() -> None:
    built = tiny.add_lora(tiny.model("Qwen2"), r=4)
    config = GRPOConfig(lora_r=4, bf16=False, dtype="float32", use_cpu=True)
    bare = adapted_model(config, built.config, built.config.num_hidden_layers)
    found = Shape.of(bare.get_base_model(), 4)
    assert found == Shape.of(built.get_base_model(), 4)


def test_four_bits_are_what_bitsandbytes_keeps() -> None:
    bnb: Any = pytest.importorskip("bitsandbytes")
    model = tiny.model("Llama", hidden_size=256, intermediate_size=512)
    frozen = model.requires_grad_(False)
    for name, linear in list(frozen.get_decoder().named_modules()):
        if isinstance(linear, torch.nn.Linear):
            four = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4"
            )
            four.weight = bnb.nn.Params4bit(linear.weight.data, quant_type="nf4")
            frozen.get_decoder().set_submodule(name, four.to("cpu"))  # quantises
    products = Shape.of(frozen, 2).products
    kept = 0
    for module in frozen.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            kept += module.weight.nbytes + state.absmax.nbytes
            if state.nested:
                kept += state.state2.absmax.nbytes + state.state2.code.nbytes
    assert sum(p.nbytes for p in products) == pytest.approx(kept, rel=0.02)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(UnknownShapeError, match="no linear layer"):
        Shape.of(tiny.mixture("Mixtral"), 4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    built = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    with pytest.raises(UnknownShapeError, match="not all layers have attention"):
        Shape.of(built, 4)
    with pytest.raises(UnknownShapeError, match="no plain LoRA"):
        Shape.of(tiny.add_lora(tiny.model("Llama"), use_dora=True).get_base_model(), 4)


def test_cards_are_found_by_the_names_that_torch_gives() -> None:
    h200 = find_card("NVIDIA H200")
    assert h200 is not None and h200 == find_card("h200")
    assert (h200.flops, h200.bandwidth) == (989.5e12, 4.8e12)
    for name in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", ""):
        assert find_card(name) is None
    names = [name for card in CARDS for name in (card.name, *card.torch_names)]
    assert len(names) == len(set(names))
    assert all(card.name == card.name.upper() for card in CARDS)
