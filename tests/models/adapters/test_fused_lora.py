"""LoRA layers of whole models in one node for each input: as peft computes them, and left to peft
where it does something else."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fusedgrpo.models.activation_offload import OffloadActivations
from fusedgrpo.models.adapters import fused_lora
from fusedgrpo.models.adapters.fused_lora import FusedLora
from fusedgrpo.models.loading import enable_checkpointing
from fusedgrpo.models.policy import Policy

PAIRS = [([5, 6, 7], [8, 9, 10, 4]), ([5, 6, 7], [11, 9]), ([12], [5, 6, 7])]
IDS = torch.arange(3, 27)[None] % tiny.VOCAB


def adapted(family: str = "Qwen2", **lora: Any) -> Any:
    # No power of two, so that it has to round.
    return tiny.add_lora(tiny.model(family), **{"lora_alpha": 3} | lora)


def learned(model: Any) -> FusedLora:
    lora = FusedLora(model)
    with torch.no_grad(), model.disable_adapter(), lora.learn():
        states(model)
    return lora


def states(model: Any) -> Tensor:
    found: Tensor = model.get_base_model().get_decoder()(input_ids=IDS, use_cache=False)[0]
    return found


def gradients(model: Any, of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(of, [p for p in model.parameters() if p.requires_grad]))


@contextlib.contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Inside, how many layers each node has computed for."""
    sizes: list[int] = []
    original = fused_lora.lora_linears

    def noting(x: Tensor, layers: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        sizes.append(len(layers))
        return original(x, layers, dtype)

    with patch.context() as inside:
        inside.setattr(fused_lora, "lora_linears", noting)
        yield sizes


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    with counted(monkeypatch) as sizes:
        yield sizes


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_gradients_of_a_model_are_pefts(
    family: str, checkpointing: bool, nodes: list[int]
) -> None:
    model = adapted(family).double()
    if checkpointing:
        enable_checkpointing(model.get_base_model())
        model.train()
    lora = learned(model)
    expected = gradients(model, states(model).square().sum())
    assert not nodes
    with lora.active():
        found = gradients(model, states(model).square().sum())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    layers = model.get_base_model().config.num_hidden_layers
    of_layer = [1, 1, 1, 1] if family == "Phi3" else [3, 1, 2, 1]
    assert nodes == of_layer * layers + (of_layer * layers if checkpointing else [])
    assert lora.left_to_peft == {}


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_policys_logprobs_and_gradients_are_pefts(
    precision: torch.dtype | None, checkpointing: bool
) -> None:
    found = []
    for fused in (True, False):
        model = adapted("Llama", r=4)
        if checkpointing:
            enable_checkpointing(model.get_base_model())
        model.train()
        policy = Policy(model, compute_dtype=precision, fused_lora=fused)
        with policy.training():
            logp = policy.logprobs(policy.pack(PAIRS)).logp
            grads = gradients(model, logp.sum())
        found.append((logp.detach(), torch.cat([g.flatten() for g in grads])))
    (logp, grads), (want_logp, want_grads) = found
    close = 2e-6 if precision is None else 0.05
    assert (logp - want_logp).abs().max() < 4 * close
    assert (grads - want_grads).norm() < close * want_grads.norm()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_with_and_without_gradients_the_same_bits(precision: torch.dtype | None) -> None:
    policy = Policy(adapted(), compute_dtype=precision)
    packed = policy.pack(PAIRS)
    with policy.scoring():
        scored = policy.logprobs(packed).logp
    with policy.training():
        trained = policy.logprobs(packed).logp
    assert trained.requires_grad and torch.equal(trained, scored)
    assert torch.equal(policy.logprobs(packed).logp, scored)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_new_adapter_is_its_reference_to_the_bit(precision: torch.dtype | None) -> None:
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    policy = Policy(model, compute_dtype=precision)
    packed = policy.pack(PAIRS)
    with policy.scoring(), policy.reference():
        reference = policy.logprobs(packed).logp
    with policy.training():
        assert torch.equal(policy.logprobs(packed).logp, reference)


def test_the_same_bits_every_time_and_with_checkpointing() -> None:
    found = []
    for checkpointing in (False, True, True):
        model = adapted()
        if checkpointing:
            enable_checkpointing(model.get_base_model())
        policy = Policy(model.train())
        with policy.training():
            found.append(gradients(model, policy.logprobs(policy.pack(PAIRS)).logp.sum()))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_what_is_kept_may_wait_on_the_host() -> None:
    model = adapted()
    policy = Policy(model)
    packed = policy.pack(PAIRS)
    with policy.training():
        kept = gradients(model, policy.logprobs(packed).logp.sum())
        with OffloadActivations("cpu", min_bytes=64):
            logp = policy.logprobs(packed).logp
        moved = gradients(model, logp.sum())
    assert all(torch.equal(a, b) for a, b in zip(kept, moved, strict=True))


def test_several_adapters_of_which_one_trains(nodes: list[int]) -> None:
    model = adapted()
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    tiny.stir(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".second." in name)
    model.double()
    lora = learned(model)
    expected = gradients(model, states(model).square().sum())
    with lora.active():
        found = gradients(model, states(model).square().sum())
    assert nodes == [3, 1, 2, 1] * 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    found = []
    for fused in (True, False):
        model = tiny.model("Qwen2")
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                old: nn.Linear = getattr(layer.mlp, name)
                new = bnb.nn.Linear4bit(
                    old.in_features, old.out_features, bias=False, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(
                    old.weight.data.clone(), requires_grad=False, quant_type="nf4"
                )
                setattr(layer.mlp, name, new.to("cpu"))
        adapted = tiny.add_lora(model, lora_alpha=3)
        policy = Policy(adapted, fused_lora=fused)
        with counted(monkeypatch) as sizes, policy.training():
            logp = policy.logprobs(policy.pack(PAIRS)).logp
            found.append((logp.detach(), gradients(adapted, logp.sum())))
        assert sizes == ([3, 1, 2, 1] * 2 if fused else [])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# --- what peft keeps ----------------------------------------------------------------------------


def hooked(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(
        lambda *_: None
    )


def nothing_more(model: Any) -> None:
    pass


def trains_its_bias(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias.requires_grad_()


def has_a_forward(model: Any) -> None:
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.forward = layer.forward


@pytest.mark.parametrize(
    ("options", "change", "reason", "layers"),
    [
        ({"use_dora": True}, nothing_more, "a variant of LoRA (DoraLinearVariant)", 14),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, nothing_more, "lora_bias", 2),
        ({"lora_dropout": 0.5}, nothing_more, "dropout in the adapter", 14),
        ({}, hooked, "hooks on its parts", 1),
        ({}, trains_its_bias, "a base layer that trains", 1),
        ({}, has_a_forward, "somebody has put", 1),
    ],
)
def test_what_is_no_plain_lora_computes_as_peft_has_it_and_it_is_said(
    options: Any, change: Any, reason: str, layers: int, caplog: Any, nodes: list[int]
) -> None:
    model = adapted(**options).double()
    change(model)
    lora = learned(model.eval())
    model.train()
    torch.manual_seed(0)
    expected = gradients(model, states(model).square().sum())
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, "fusedgrpo"):
        for _ in range(2):
            with lora.active():
                torch.manual_seed(0)
                found = gradients(model, states(model).square().sum())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert list(lora.left_to_peft.values()) == [layers]
    assert reason in next(iter(lora.left_to_peft))
    assert sum(reason in line for line in caplog.messages) == 1
    assert sum(nodes) == 2 * (14 - layers) * (layers == 1)


def test_dropout_is_pefts_while_it_trains_only(nodes: list[int]) -> None:
    model = adapted(lora_dropout=0.5)
    lora = learned(model.eval())
    expected = states(model)
    with lora.active():
        torch.testing.assert_close(states(model), expected, rtol=1e-4, atol=1e-5)
    assert nodes == [3, 1, 2, 1] * 2


def test_adapters_that_are_switched_off_or_changed_inside(nodes: list[int]) -> None:
    model = adapted()
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    tiny.stir(model)
    model.set_adapter("second")
    tiny.stir(model)
    second = states(model)
    model.set_adapter("default")
    with model.disable_adapter():
        base = states(model)
    first = states(model)
    lora = learned(model)
    with lora.active():
        torch.testing.assert_close(states(model), first, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(states(model), base)
        model.set_adapter("second")
        torch.testing.assert_close(states(model), second, rtol=1e-4, atol=1e-5)
        model.merge_adapter()
        used = len(nodes)
        torch.testing.assert_close(states(model), second, rtol=1e-4, atol=1e-5)
        assert len(nodes) == used
        model.unmerge_adapter()
    assert (first - base).abs().max() > 1e-2 and (second - first).abs().max() > 1e-2


def test_adapters_in_another_dtype_than_their_layer_are_pefts(nodes: list[int]) -> None:
    model = tiny.add_lora(tiny.model().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    lora = learned(model)
    expected = states(model)
    with lora.active():
        assert torch.equal(states(model), expected)
    assert not nodes and lora.left_to_peft == {"dtypes or arguments that peft has rules for": 14}
    with lora.active(), torch.autocast("cpu", torch.bfloat16):
        states(model)
    assert nodes == [3, 1, 2, 1] * 2 and lora.left_to_peft == {}


# --- handing out --------------------------------------------------------------------------------


def attention(model: Any) -> Any:
    return model.get_base_model().get_decoder().layers[0].self_attn


def test_results_are_handed_out_to_those_that_ask_for_that_very_input(nodes: list[int]) -> None:
    model = adapted()
    lora, part = learned(model), attention(model)
    a, b = torch.randn(2, 1, 5, 16).unbind()

    def calls() -> list[Tensor]:
        return [
            part.q_proj(a), part.k_proj(b), part.v_proj(a), part.v_proj(b), part.q_proj(a),
            part.q_proj(a), part.v_proj(a), part.k_proj(a),
        ]  # fmt: skip

    expected = calls()
    with lora.active():
        found = calls()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # q(a) | k(b) | v(a) | v(b) | q(a) | q(a) again, from which v and k take theirs
    assert nodes == [3] * 6


def test_an_input_that_has_changed_is_another_one() -> None:
    model = adapted()
    lora, part = learned(model), attention(model)
    with torch.no_grad(), lora.active():
        x = torch.randn(1, 5, 16)
        part.q_proj(x)
        x.mul_(2)
        found = part.k_proj(x)
    torch.testing.assert_close(found, part.k_proj(x), rtol=1e-5, atol=1e-5)


def test_what_was_computed_without_a_gradient_is_not_for_those_who_need_one() -> None:
    model = adapted()
    lora, part = learned(model), attention(model)
    x = torch.randn(1, 5, 16)
    with lora.active():
        with torch.no_grad():
            part.q_proj(x)
        assert part.k_proj(x).requires_grad
        with torch.no_grad():
            assert not part.v_proj(x).requires_grad


def test_what_nobody_came_for_does_not_outlive_the_pass() -> None:
    model = adapted()
    lora, part = learned(model), attention(model)
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        with lora.active():
            part.q_proj(x)
        for parameter in part.k_proj.lora_B.parameters():
            parameter.mul_(3)
        expected = part.k_proj(x)
        with lora.active():
            torch.testing.assert_close(part.k_proj(x), expected, rtol=1e-5, atol=1e-5)


def test_behind_an_error_everything_is_as_before() -> None:
    model = adapted()
    lora, part = learned(model), attention(model)
    with pytest.raises(RuntimeError), lora.active():
        part.q_proj(torch.randn(1, 5, 17))
    assert not any("forward" in vars(module) for module in model.modules())
    expected = states(model)
    with lora.active(), lora.active():
        torch.testing.assert_close(states(model), expected, rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_who_shares_an_input_is_asked_of_the_model_without_its_adapters() -> None:
    model = adapted()
    seen: list[bool] = []
    part = attention(model)
    part.q_proj.register_forward_hook(lambda layer, *_: seen.append(layer.disable_adapters))
    policy = Policy(model)
    assert seen[0] and not any(seen[1:])
    before = len(seen)
    with policy.training(), policy.scoring():
        policy.logprobs(policy.pack(PAIRS))
    assert len(seen) == before + 1, "it is asked once"


def test_without_training_around_it_a_checkpointed_backward_pass_is_an_error() -> None:
    """Not silently another computation."""
    model = adapted()
    enable_checkpointing(model.get_base_model())
    policy = Policy(model.train())
    loss = policy.logprobs(policy.pack(PAIRS)).logp.sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_a_policy_of_somebody_elses_trainer_leaves_layers_alone(nodes: list[int]) -> None:
    policy = Policy(adapted(), compute_dtype="inherit")
    assert policy.lora is None
    policy.logprobs(policy.pack(PAIRS)).logp.sum().backward()
    assert not nodes
