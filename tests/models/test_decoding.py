"""Decoding gives the log-probs of training, whatever a layer remembers; else it is refused."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import hybrids
import pytest
import tiny
import torch

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.errors import ModelError
from fusedgrpo.models import decoding
from fusedgrpo.models.decoding import ROUTES, Route, choose_route
from fusedgrpo.models.policy import Policy

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 9], [3, 30, 20], [8, 7]]

# The others behave like one of these.
FAST = ("Qwen3.5", "LFM2", "Mamba", "RecurrentGemma")
FAMILIES = [
    family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
    for family in hybrids.FAMILIES
]


def sampler(policy: Policy, in_flight: int | None = None) -> GenerateSampler:
    return GenerateSampler(
        policy, tiny.tokenizer(), [tiny.EOS], execution=Execution(OOMRetry(4096, in_flight))
    )


def ids(groups: Any) -> list[list[tuple[int, ...]]]:
    return [[c.ids for c in group.completions] for group in groups]


def gap(policy: Policy, groups: Any) -> float:
    """The largest difference between the sampler's log-probs and the trainer's."""
    pairs = [(g.prompt_ids, c.ids) for g in groups for c in g.completions]
    sampled = torch.cat([c.logp for g in groups for c in g.completions])
    with policy.scoring():
        return float((policy.logprobs(policy.pack(pairs)).logp - sampled).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_sampled_from_as_it_is_trained(family: str) -> None:
    policy = Policy(hybrids.model(family))
    s = sampler(policy)
    groups = s.sample(PROMPTS, 2, SamplingParams(max_new_tokens=6), seed=1)
    assert [list(g.prompt_ids) for g in groups] == PROMPTS
    assert gap(policy, groups) < 1e-4
    assert policy.layout == "rows"
    for in_flight in (1, 3):
        batches = sampler(policy, in_flight).sample(PROMPTS, 2, SamplingParams(max_new_tokens=6), 1)
        assert ids(batches) == ids(groups)
    penalty = SamplingParams(max_new_tokens=8, repetition_penalty=1e6, greedy=True)
    for group in s.sample(PROMPTS, 1, penalty, seed=0):
        said = group.completions[0].ids
        assert len({*group.prompt_ids, *said}) == len(set(group.prompt_ids)) + len(said)
    s.warm_up([[5] * 6, [7] * 4], 2, SamplingParams(max_new_tokens=9))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("LFM2", ROUTES[0]),
        ("Mamba", ROUTES[0]),
        ("RecurrentGemma", Route(forked=False, padded=False)),
        pytest.param("RWKV", ROUTES[3], marks=pytest.mark.slow),
    ],
)
def test_the_route_is_the_fastest_that_is_right(
    family: str, expected: Route, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy(hybrids.model(family))
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        assert choose_route(policy) == expected == choose_route(policy)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert ("is decoded" in caplog.text) == (expected != ROUTES[0])


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_keep_the_fastest_route(family: str, dtype: torch.dtype) -> None:
    model = tiny.add_lora(tiny.model(family)).to(dtype)
    assert choose_route(Policy(model)) == ROUTES[0]


def test_what_no_cache_remembers_is_computed_again() -> None:
    """A layer that ignores the mask: the sum over all that came before, padding included."""

    def leak(module: Any, inputs: Any, output: Any) -> Any:
        return output + 0.3 * output.cumsum(1)

    model = tiny.model("Llama")
    model.model.embed_tokens.register_forward_hook(leak)
    policy = Policy(model)
    assert choose_route(policy) == ROUTES[-1]
    groups = sampler(policy).sample(PROMPTS, 2, SamplingParams(max_new_tokens=5), seed=1)
    assert gap(policy, groups) < 1e-4


def test_a_generate_that_is_another_policy_is_refused_by_name() -> None:
    model = tiny.model("Llama")
    forward = model.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)
        return output

    policy = Policy(model)
    model.forward = other
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be sampled from.*off by"):
        choose_route(policy)


def test_weights_that_are_not_finite_are_left_to_others() -> None:
    model = tiny.model("Llama")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    assert choose_route(Policy(model)) == ROUTES[0]


def test_memory_that_runs_out_in_the_trial_is_not_taken_for_a_wrong_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("full")

    policy = Policy(tiny.model())
    monkeypatch.setattr(decoding, "_decoded", full)
    with pytest.raises(torch.OutOfMemoryError):
        choose_route(policy)


def test_rounding_that_a_deep_model_amplifies_keeps_the_cache(monkeypatch):
    """Without one, each token costs a forward pass over everything before it."""
    model = tiny.model("Qwen2", hidden_size=64, num_hidden_layers=28)
    policy = Policy(model, compute_dtype=torch.bfloat16)
    monkeypatch.setitem(decoding.TOLERANCE, torch.bfloat16, (1e-4, 0.3))
    off = torch.randn(6, 4, policy.vocabulary_size)

    def none_is_exact(policy, route, pairs):
        """What a 7B model does on a GPU: with a cache ten times further off than without."""
        return decoding.trained(policy, pairs) + off * (0.3 if route.cached else 0.03)

    monkeypatch.setattr(decoding, "_decoded", none_is_exact)
    assert choose_route(policy) == ROUTES[0]
    monkeypatch.setattr(decoding, "rounded_otherwise", lambda *_: contextlib.nullcontext())
    assert not choose_route(policy).cached, "were it not for what rounding makes of it"
