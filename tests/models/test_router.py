"""The load-balancing loss as sums over tokens: transformers' own, in every layout and cut."""

from __future__ import annotations

import logging

import hybrids
import pytest
import tiny
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fusedgrpo.errors import ModelError
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.router import find_router

PAIRS = [
    ((5, 6, 7), (8, 9, 10, 4)),
    ((5, 6, 7), (11, 12)),
    ((9, 4), (3, 3, 8)),
    ((5, 6, 7), ()),
    ((9, 4), (20,)),
]


# Families whose decoder does not return what its routers say in transformers 5.17.
WITHOUT_LOGITS = {"GraniteMoe", "Glm4Moe"}


def padded(pairs):
    longest = max(len(p) + len(c) for p, c in pairs)
    rows = [[*p, *c, *[0] * (longest - len(p) - len(c))] for p, c in pairs]
    mask = [[int(i < len(p) + len(c)) for i in range(longest)] for p, c in pairs]
    return torch.tensor(rows), torch.tensor(mask)


def of_transformers(model, pairs, router):
    ids, mask = padded(pairs)
    outputs = model.get_decoder()(
        input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False
    )
    return load_balancing_loss_func(outputs.router_logits, router.experts, router.top_k, mask)


def routed(policy, pairs, counted=None):
    """The sums of a batch."""
    found = []
    policy.logprobs(policy.pack(pairs, counted), routed=found)
    return found[0]


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("shared_prompt", ["auto", "off"])
@pytest.mark.parametrize("family", tiny.MIXTURES)
def test_it_is_that_of_transformers_on_padded_rows(family, shared_prompt):
    """Prompts that are forwarded once count for every completion."""
    model = tiny.mixture(family)
    if family in WITHOUT_LOGITS and transformers.__version__.startswith("5.17."):
        with pytest.raises(ModelError, match="router_aux_loss_coef"):
            find_router(model, 0.1)
        return
    router = find_router(model, 0.1)
    want = of_transformers(model, PAIRS, router)
    wanted = gradients(want, model)
    policy = Policy(model, shared_prompt=shared_prompt, router=router)
    assert policy.layout in ("shared", "packed") or family == "GptOss"
    ours = router.loss(routed(policy, PAIRS))
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=0)
    for got, expected in zip(gradients(ours, model), wanted, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_cut_changes_nothing():
    model = tiny.mixture()
    policy = Policy(model, router=find_router(model, 0.1))
    router = policy.router

    whole = routed(policy, PAIRS)
    want = gradients(router.loss(whole), model)
    parts = [routed(policy, part) for part in (PAIRS[:1], PAIRS[1:3], PAIRS[3:])]
    load = parts[0] + parts[1] + parts[2]
    assert load.chosen.tolist() == whole.chosen.tolist()
    losses = [router.loss(part, load) for part in parts]
    torch.testing.assert_close(sum(losses), router.loss(whole))
    for got, expected in zip(gradients(sum(losses), model), want, strict=True):
        if expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_completions_out_of_the_loss_do_not_count():
    model = tiny.mixture()
    policy = Policy(model, router=find_router(model, 0.1))
    counted = [True, False, True, True, False]
    seen = [(p, c if kept else ()) for (p, c), kept in zip(PAIRS, counted, strict=True)]
    want = of_transformers(model, seen, policy.router)
    got = routed(policy, PAIRS, counted)
    torch.testing.assert_close(policy.router.loss(got), want, rtol=1e-6, atol=0)


def test_log_probs_are_those_without_the_routers_loss():
    model = tiny.mixture()
    plain, watched = Policy(model), Policy(model, router=find_router(model, 0.1))
    want, got = (p.logprobs(p.pack(PAIRS)).logp for p in (plain, watched))
    torch.testing.assert_close(got, want)


def test_the_coefficient_is_the_models_unless_one_is_given(caplog):
    with caplog.at_level(logging.INFO):
        assert find_router(tiny.mixture(router_aux_loss_coef=0.02), None).coef == 0.02
    assert "router_aux_loss_coef is 0.02 (the model's own)" in caplog.text
    assert find_router(tiny.mixture(), 0.5).coef == 0.5
    assert find_router(tiny.mixture(), 0.0) is None
    assert find_router(tiny.mixture(router_aux_loss_coef=0.0), None) is None
    assert find_router(tiny.mixture("Glm4Moe"), None) is None  # declares none
    assert find_router(tiny.model(), None) is None


def test_a_dense_model_has_no_router_to_balance():
    with pytest.raises(ModelError, match=r"router_aux_loss_coef: 0.1, but Qwen2ForCausalLM is no"):
        find_router(tiny.model(), 0.1)
    assert find_router(tiny.model(), 0.0) is None


def test_another_loss_than_the_usual_one_is_refused_with_the_way_on(monkeypatch):
    model = tiny.mixture()
    forward = model.forward

    def other(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.aux_loss = outputs.aux_loss * 1.5
        return outputs

    monkeypatch.setattr(model, "forward", other)
    with pytest.raises(ModelError, match=r"does not know .*router_aux_loss_coef: 0 trains"):
        find_router(model, None)
    monkeypatch.setattr(type(model.model), "forward", lambda self, **_: torch.nn.Module())
    monkeypatch.setattr(model, "forward", lambda **_: None)
    with pytest.raises(ModelError, match=r"no load-balancing loss that fusedgrpo knows\. router_a"):
        find_router(model, 0.1)


def test_a_model_without_experts_of_a_family_that_has_some_is_dense() -> None:
    assert find_router(hybrids.model("Granite-4-H"), None) is None
