"""Adapters of one input in one product, or folded into a copy: other roundings of the same policy.

The trained weights, the base and the modules are afterwards as they were before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fusedgrpo.models.adapters import few_rows, merged_weights, rollout_weights
from fusedgrpo.models.adapters.merged_weights import MergedWeights
from fusedgrpo.models.adapters.plain_lora import all_plain, plain_layers
from fusedgrpo.models.adapters.rollout_weights import AdapterWeights, RolloutWeights
from fusedgrpo.models.policy import Policy

FAMILIES = ["Llama", "Qwen2", "Gemma2", "Phi3"]
KINDS = [AdapterWeights, MergedWeights]
IDS = torch.arange(3, 27)[None]

Make = Callable[[Policy], RolloutWeights]


def policy(family: str = "Qwen2", dtype: torch.dtype | None = None, **lora: Any) -> Policy:
    model = tiny.add_lora(tiny.model(family), **lora)
    tiny.stir(model)
    return Policy(model, compute_dtype=dtype)


def states(on: Policy) -> Tensor:
    with on.scoring(), on.autocast():
        hidden: Tensor = on.causal_lm.get_decoder()(input_ids=IDS).last_hidden_state
    return hidden


def learned(make: Make, on: Policy) -> RolloutWeights:
    weights = make(on)
    with weights.learn():
        states(on)
    return weights


def through(weights: RolloutWeights, on: Policy) -> Tensor:
    with weights.active():
        return states(on)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_policy(family: str, make: Make) -> None:
    on = policy(family)
    expected = states(on)
    with on.reference():
        base = states(on)
    weights = learned(make, on)
    assert weights.layers == plain_layers(on) and all_plain(on)
    for _ in range(2):
        torch.testing.assert_close(through(weights, on), expected, rtol=1e-4, atol=1e-5)
    assert (base - expected).abs().max() > 1e-2, "the adapters count for something here"


@pytest.mark.parametrize("make", KINDS)
def test_what_shares_an_input_is_one_product(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    on = policy("Llama")
    weights = learned(make, on)
    expected = states(on)
    for family in weights._families:
        family.stacked = True  # type: ignore[attr-defined]  # as on a GPU
    through(weights, on)
    plain, products = few_rows.product, []
    kept = {family.kept.data_ptr() for family in weights._families}  # type: ignore[union-attr]

    def noting(x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        if weight.data_ptr() in kept:
            products.append(weight)
        return plain(x, weight, *bias)

    for module in (rollout_weights, merged_weights):
        monkeypatch.setattr(module, "product", noting)
    torch.testing.assert_close(through(weights, on), expected, rtol=1e-4, atol=1e-5)
    layers = on.causal_lm.config.num_hidden_layers
    assert len(products) == 4 * layers, "q k v, o, gate up, down"


@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_a_few_rows(rows: int, bias: bool) -> None:
    x, weight = torch.randn(1, rows, 24), torch.randn(40, 24)
    added = torch.randn(40) if bias else None
    found = few_rows.product(x, weight, added)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, added))


@pytest.mark.parametrize("make", KINDS)
def test_nothing_is_changed(make: Make) -> None:
    on = policy()
    before = {name: tensor.clone() for name, tensor in on.model.state_dict().items()}
    expected = states(on)
    weights = learned(make, on)
    through(weights, on)
    assert torch.equal(states(on), expected), "peft's own forward is back"
    after = on.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any("forward" in vars(layer) for layer in on.model.modules())
    with pytest.raises(KeyError), weights.active():
        raise KeyError
    assert not any("forward" in vars(layer) for layer in on.model.modules())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("how", ["an optimizer step", "told"])
def test_it_follows_the_weights(make: Make, how: str) -> None:
    on = policy()
    weights = learned(make, on)
    before = through(weights, on)
    addresses = [family.kept.data_ptr() for family in weights._families]  # type: ignore[union-attr]
    for _, parameter in on.trainable():
        change = 0.3 * torch.ones_like(parameter)
        if how == "told":
            parameter.data += change  # which torch does not count
        else:
            with torch.no_grad():
                parameter += change
    if how == "told":
        weights.changed()
    after = through(weights, on)
    torch.testing.assert_close(after, states(on), rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-2
    kept = [family.kept.data_ptr() for family in weights._families]  # type: ignore[union-attr]
    assert kept == addresses, "graphs read the same addresses"


@pytest.mark.parametrize("make", KINDS)
def test_an_input_that_was_shared_and_is_not_any_more(make: Make) -> None:
    on = policy("Llama")
    weights = learned(make, on)
    attention = on.causal_lm.get_decoder().layers[0].self_attn
    a, b = torch.randn(2, 5, attention.q_proj.in_features).unbind()
    with on.scoring():
        expected = [attention.q_proj(a), attention.k_proj(b), attention.q_proj(b)]
        with weights.active():
            found = [attention.q_proj(a), attention.k_proj(b), attention.q_proj(b)]
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", KINDS)
def test_layers_that_the_first_pass_did_not_meet(make: Make) -> None:
    on = policy("Llama")
    weights = make(on)
    with weights.learn():
        pass
    torch.testing.assert_close(through(weights, on), states(on), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(make: Make, dtype: torch.dtype) -> None:
    on = policy(dtype=dtype)
    exact = states(policy())
    found = through(learned(make, on), on)
    error, own = ((x.float() - exact).norm() / exact.norm() for x in (found, states(on)))
    assert error < 2 * own < 0.1, "about as far from float32 as peft's own forward"


def test_an_adapter_of_another_kind_keeps_pefts_forward() -> None:
    on = policy(use_dora=True)
    assert not all_plain(on) and not plain_layers(on)
    weights = learned(AdapterWeights, on)
    assert torch.equal(through(weights, on), states(on))


def test_two_adapters_at_once() -> None:
    model = tiny.add_lora(tiny.model())
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    tiny.stir(model)
    on = Policy(model)
    for make in KINDS:
        torch.testing.assert_close(through(learned(make, on), on), states(on), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", KINDS)
def test_four_bits(make: Make) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny.model("Llama")
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old: nn.Linear = getattr(layer.mlp, name)
            new = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, quant_type="nf4"
            )
            new.weight = bitsandbytes.nn.Params4bit(
                old.weight.data.clone(), requires_grad=False, quant_type="nf4"
            )
            setattr(layer.mlp, name, new.to("cpu"))
    adapted = tiny.add_lora(model)
    tiny.stir(adapted)
    on = Policy(adapted)
    packed = [p.clone() for p in adapted.parameters() if p.dtype == torch.uint8]
    assert packed
    expected = states(on)
    torch.testing.assert_close(through(learned(make, on), on), expected, rtol=1e-3, atol=1e-4)
    after = [p for p in adapted.parameters() if p.dtype == torch.uint8]
    assert all(torch.equal(x, y) for x, y in zip(packed, after, strict=True))
