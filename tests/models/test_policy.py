"""``Policy``: its log-probs are the model's own, and its reference does not move."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from fusedgrpo.models.packed_batch import Layout, PackedBatch, Pair
from fusedgrpo.models.policy import Policy

# Ragged: one-token prompt, one-token completion, an empty one, longer than any sliding window.
PAIRS = [
    ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14, tiny.EOS]),
    ([4], [5, 6]),
    ([9, 9], [tiny.PAD]),
    ([tiny.BOS, 4], [3, 1, 1, 4, 5, 6, 7, 8, 39, 0]),
    ([7, 8], []),
]
PACKED = PackedBatch.build(PAIRS, "cpu")


def own_logits(model: torch.nn.Module, temperature: float) -> Tensor:
    """``[N, V]``: each sequence alone, through the model's own head."""
    rows = []
    for prompt, completion in PAIRS:
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        rows.append(logits[len(prompt) - 1 : len(prompt) + len(completion) - 1])
    return torch.cat(rows).float() / temperature


def own_logprobs(model: torch.nn.Module, temperature: float = 1.0) -> Tensor:
    logp = own_logits(model, temperature).log_softmax(-1)
    return logp.gather(1, PACKED.targets[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_and_gradients_are_those_of_the_models_own_logits(
    family: str, temperature: float
) -> None:
    model = tiny.model(family)
    policy = Policy(model, temperature=temperature)
    direction = torch.randn(len(PACKED.targets))

    expected = own_logprobs(model, temperature)
    (expected * direction).sum().backward()
    expected_grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logp = policy.logprobs(PACKED).logp
    (logp * direction).sum().backward()

    assert logp.dtype == torch.float32
    assert expected.std() > 0.2, "a uniform distribution would prove nothing"
    torch.testing.assert_close(logp, expected, rtol=0, atol=3e-6)
    for name, parameter in model.named_parameters():
        want = expected_grads[name]
        assert want is not None and parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("layout", ["shared", "packed", "rows"])
@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "Mistral"])
def test_a_conversation_is_that_of_one_forward_pass(family: str, layout: Layout) -> None:
    """Of several turns: log-probs and gradients of what the policy wrote, and of nothing else."""
    model = tiny.model(family)
    policy = Policy(model, temperature=0.7)
    conversations = [
        Pair([5, 6, 7], [8, 9, 1, 20, 21, 22, 23, 11, 12, 1, 30, 13, 1], ((3, 7), (10, 11))),
        Pair([5, 6, 7], [31, 32, 14, 1], ((0, 2),)),
        Pair([15], [16, 1, 33], ((2, 3),)),
    ]
    packed = PackedBatch.build(conversations, "cpu", layout)
    direction = torch.randn(len(packed.targets))

    expected = []
    for prompt, completion, given in conversations:
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0] / 0.7
        logp = logits.float().log_softmax(-1)
        inside = {t for start, stop in given for t in range(start, stop)}
        expected += [
            logp[len(prompt) + t - 1, token]
            for t, token in enumerate(completion)
            if t not in inside
        ]
    (torch.stack(expected) * direction).sum().backward()
    expected_grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    logp = policy.logprobs(packed).logp
    (logp * direction).sum().backward()

    torch.testing.assert_close(logp, torch.stack(expected), rtol=0, atol=5e-6)
    for name, parameter in model.named_parameters():
        want = expected_grads[name]
        assert want is not None and parameter.grad is not None, name
        assert (parameter.grad - want).norm() <= 1e-5 * want.norm(), name


def test_a_head_with_a_bias() -> None:
    model = tiny.model("Llama")
    model.lm_head = torch.nn.Linear(16, tiny.VOCAB, bias=True)
    torch.nn.init.normal_(model.lm_head.bias)
    torch.testing.assert_close(
        Policy(model).logprobs(PACKED).logp, own_logprobs(model), rtol=0, atol=3e-6
    )


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    model = tiny.model()
    entropy = Policy(model, temperature=0.6).logprobs(PACKED, entropy=True).entropy
    expected = torch.distributions.Categorical(logits=own_logits(model, 0.6)).entropy()
    assert entropy is not None
    torch.testing.assert_close(entropy, expected, rtol=0, atol=1e-5)


def test_the_other_sequences_of_a_batch_do_not_matter() -> None:
    policy = Policy(tiny.model("Gemma3"))
    together = policy.logprobs(PACKED).logp
    alone = [policy.logprobs(PackedBatch.build([pair], "cpu")).logp for pair in PAIRS]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=3e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny.model()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = Policy(model.train())
        policy.logprobs(PACKED).logp.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        assert one is not None and torch.equal(one, other)


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(IndexError):
        Policy(tiny.model()).logprobs(PackedBatch.build([([4], [tiny.VOCAB])], "cpu"))


def test_computing_in_bfloat16_stays_near_float32() -> None:
    model = tiny.model()
    exact = Policy(model).logprobs(PACKED).logp
    rounded = Policy(model, compute_dtype=torch.bfloat16).logprobs(PACKED).logp
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1


def reference_logprobs(policy: Policy) -> Tensor:
    with policy.scoring(), policy.reference():
        return policy.logprobs(PACKED).logp


def test_with_lora_the_reference_is_the_initial_model_bit_for_bit() -> None:
    base = tiny.model()
    with torch.no_grad():
        initial = Policy(base).logprobs(PACKED).logp
    policy = Policy(tiny.add_lora(base))
    tiny.stir(policy.model, 0.3)
    with policy.scoring():
        assert (policy.logprobs(PACKED).logp - initial).abs().max() > 0.01
    assert torch.equal(reference_logprobs(policy), initial)
    with policy.scoring():
        assert (policy.logprobs(PACKED).logp - initial).abs().max() > 0.01


def test_the_reference_of_a_trained_adapter_is_that_adapter() -> None:
    policy = Policy(tiny.add_lora(tiny.model()), keep_reference="adapter")
    with policy.scoring():
        initial = policy.logprobs(PACKED).logp
    tiny.stir(policy.model)
    assert torch.equal(reference_logprobs(policy), initial)
    with policy.scoring():
        assert not torch.equal(policy.logprobs(PACKED).logp, initial)


def test_without_adapters_the_reference_is_a_frozen_copy() -> None:
    policy = Policy(tiny.model(), keep_reference="model")
    with torch.no_grad():
        initial = policy.logprobs(PACKED).logp
    tiny.stir(policy.model, 0.05)
    assert torch.equal(reference_logprobs(policy), initial)
    assert not torch.equal(policy.logprobs(PACKED).logp, initial)
    assert policy._reference_model is not None
    assert not any(p.requires_grad for p in policy._reference_model.parameters())
    names = {n for n, _ in policy.trainable()}
    assert names == {n for n, _ in policy.model.named_parameters()}


def test_an_error_inside_the_reference_brings_the_policy_back() -> None:
    full = Policy(tiny.model(), keep_reference="model")
    adapted = Policy(tiny.add_lora(tiny.model()))
    for policy in (full, adapted):
        model = policy.model
        before = policy.logprobs(PACKED).logp
        with pytest.raises(KeyError), policy.reference():
            raise KeyError
        assert policy.model is model
        assert torch.equal(policy.logprobs(PACKED).logp, before)


def test_a_reference_that_was_not_kept_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="keep_reference"), Policy(tiny.model()).reference():
        pass


def test_scoring_switches_dropout_and_gradients_off_and_restores_each_module() -> None:
    model = tiny.add_lora(tiny.model(), lora_dropout=0.5).train()
    frozen = model.get_base_model().model.layers[0]
    frozen.eval()  # somebody keeps a part in eval mode
    modes = [m.training for m in model.modules()]
    policy = Policy(model)
    with policy.scoring():
        assert not any(m.training for m in model.modules())
        first, second = (policy.logprobs(PACKED).logp for _ in range(2))
        assert torch.equal(first, second) and not first.requires_grad
    assert [m.training for m in model.modules()] == modes
    assert True in modes and False in modes
    with pytest.raises(KeyError), policy.scoring():
        raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert not torch.equal(*(policy.logprobs(PACKED).logp for _ in range(2)))


def test_only_the_adapter_is_trainable_with_lora() -> None:
    policy = Policy(tiny.add_lora(tiny.model()))
    names = [name for name, _ in policy.trainable()]
    assert names and all("lora_" in name for name in names)
    policy.logprobs(PACKED).logp.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in policy.trainable())
