"""Sampling with generate: the right distribution, its true log-probs, and nothing leaks in."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.types import Group
from fusedgrpo.models.packed_batch import PackedBatch
from fusedgrpo.models.policy import Policy

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 9], [3, 30, 20]]


def sampler(
    model: Any = None, *, eos: Sequence[int] = (tiny.EOS,), temperature: float = 1.0, **options: Any
) -> GenerateSampler:
    policy = Policy(tiny.model() if model is None else model, temperature=temperature)
    return GenerateSampler(policy, tiny.tokenizer(), eos, **options)


def ids(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[c.ids for c in group.completions] for group in groups]


def policy_logp(policy: Policy, groups: Sequence[Group]) -> Tensor:
    pairs = [(g.prompt_ids, c.ids) for g in groups for c in g.completions]
    with policy.scoring():
        return policy.logprobs(PackedBatch.build(pairs, "cpu")).logp


def sampled_logp(groups: Sequence[Group]) -> Tensor:
    return torch.cat([c.logp for g in groups for c in g.completions])  # type: ignore[misc]


def filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution to sample from, written down from the definitions of the options."""
    probs = (logits / params.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    keep = torch.ones_like(probs, dtype=torch.bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    probs = torch.where(keep, probs, 0.0) / probs[keep].sum()
    if params.top_p < 1:
        before = probs[order].cumsum(0) - probs[order]
        keep[order[before >= params.top_p]] = False
        probs = torch.where(keep, probs, 0.0) / probs[keep].sum()
    if params.min_p:
        keep &= probs >= params.min_p * probs.max()
    return torch.where(keep, probs, 0.0) / probs[keep].sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_tokens_follow_the_distribution_that_was_asked_for(options: dict[str, float]) -> None:
    params = SamplingParams(max_new_tokens=1, **options)  # type: ignore[arg-type]
    model = tiny.model()
    count = 4000
    (group,) = sampler(model).sample([[5, 6, 7]], count, params, seed=11)
    expected = filtered(model(torch.tensor([[5, 6, 7]])).logits[0, -1].detach(), params).double()

    tokens = torch.tensor([c.ids[0] for c in group.completions])
    observed = torch.bincount(tokens, minlength=tiny.VOCAB).double()
    assert not observed[expected == 0].any(), "a token was sampled that the options rule out"
    possible = expected > 0
    wanted = expected[possible] * count
    chi_square = float(((observed[possible] - wanted) ** 2 / wanted).sum())
    freedom = int(possible.sum()) - 1
    # Five standard deviations of chi-square; the seed is fixed, so this either holds or not.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    assert freedom > 1
    torch.testing.assert_close(
        torch.stack([c.logp[0] for c in group.completions]),  # type: ignore[index]
        expected[tokens].log().float(),
        rtol=0,
        atol=1e-5,
    )


def test_successive_tokens_are_independent_draws() -> None:
    """A generator started anew at each token would repeat one quantile along a completion."""
    model = tiny.model()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # uniform, whatever came before
    params = SamplingParams(max_new_tokens=60)
    (group,) = sampler(model, eos=[tiny.VOCAB + 1]).sample([[5]], 20, params, seed=0)
    x = torch.tensor([c.ids for c in group.completions]).double()
    x = (x - x.mean()) / x.std()
    assert abs(float((x[:, 1:] * x[:, :-1]).mean())) < 0.1
    assert abs(float((x[1:] * x[:-1]).mean())) < 0.1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sampler_logp_is_policy_logp_at_the_same_temperature(family: str) -> None:
    s = sampler(tiny.model(family), temperature=0.7)
    groups = s.sample(PROMPTS, 3, SamplingParams(max_new_tokens=9, temperature=0.7), seed=5)
    torch.testing.assert_close(
        sampled_logp(groups), policy_logp(s.policy, groups), rtol=0, atol=1e-5
    )


def test_sampler_logp_is_policy_logp_with_an_adapter() -> None:
    s = sampler(tiny.add_lora(tiny.model()).train())
    groups = s.sample(PROMPTS, 3, SamplingParams(max_new_tokens=6), seed=5)
    logp = policy_logp(s.policy, groups)
    torch.testing.assert_close(sampled_logp(groups), logp, rtol=0, atol=1e-5)
    with s.policy.reference():
        assert (policy_logp(s.policy, groups) - logp).abs().max() > 1e-2


def test_the_same_seed_gives_the_same_completions_whatever_else_draws() -> None:
    s = sampler()
    params = SamplingParams(max_new_tokens=12)
    first = s.sample(PROMPTS, 3, params, seed=1)
    torch.rand(5)
    again = s.sample(PROMPTS, 3, params, seed=1)
    state = torch.random.get_rng_state()
    other = s.sample(PROMPTS, 3, params, seed=2)
    assert ids(first) == ids(again) != ids(other)
    assert torch.equal(sampled_logp(first), sampled_logp(again))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    assert len({c for group in ids(first) for c in group}) > 6, "completions repeat each other"


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3"])
@pytest.mark.parametrize("in_flight", [1, 3, 4, 6, 1000])
def test_completions_do_not_depend_on_how_many_are_in_flight(family: str, in_flight: int) -> None:
    model = tiny.model(family)
    params = SamplingParams(max_new_tokens=10)
    everything = sampler(model).sample(PROMPTS, 3, params, seed=1)
    batches = sampler(model, execution=Execution(OOMRetry(0, in_flight))).sample(
        PROMPTS, 3, params, seed=1
    )
    assert ids(batches) == ids(everything)
    torch.testing.assert_close(sampled_logp(batches), sampled_logp(everything), rtol=0, atol=1e-5)


def test_whole_groups_are_a_decode_batch_and_what_is_warmed_up_is_the_largest() -> None:
    s = sampler(execution=Execution(OOMRetry(0, 7)))
    params = SamplingParams(max_new_tokens=3)
    sizes, decode = [], s._decode

    def noting(prompts: Any, prompt_of: list[int], *args: Any, **kwargs: Any) -> Any:
        sizes.append((len(prompts), len(prompt_of)))
        return decode(prompts, prompt_of, *args, **kwargs)

    s._decode = noting  # type: ignore[method-assign]
    s.sample(PROMPTS[:3], 3, params, seed=1)
    assert sizes == [(2, 6), (1, 3)]
    assert s.warm_up(PROMPTS[:3], 3, params)
    assert sizes[2:] == [(2, 6)]


def test_a_completion_does_not_depend_on_the_other_prompts_or_samples() -> None:
    s = sampler()
    params = SamplingParams(max_new_tokens=10)
    whole = ids(s.sample(PROMPTS, 4, params, seed=1))
    changed = [PROMPTS[0], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32], *PROMPTS[2:]]
    others = ids(s.sample(changed, 4, params, seed=1))
    assert others[0] == whole[0] and others[2:] == whole[2:] and others[1] != whole[1]
    assert [group[:2] for group in whole] == ids(s.sample(PROMPTS, 2, params, seed=1))


def test_the_same_prompt_twice_gets_different_completions() -> None:
    one, two = ids(sampler().sample([[5, 6]] * 2, 4, SamplingParams(max_new_tokens=10), seed=1))
    assert one != two


def test_each_prompt_gets_its_group_in_order_with_its_row() -> None:
    s = sampler(execution=Execution(OOMRetry(0, 5)))
    groups = s.sample(PROMPTS, 3, SamplingParams(max_new_tokens=2), 0, rows=[7, 8, 7, 1])
    assert [g.row for g in groups] == [7, 8, 7, 1]
    assert [list(g.prompt_ids) for g in groups] == PROMPTS
    assert [len(g.completions) for g in groups] == [3] * 4
    assert s.sample([], 3, SamplingParams(max_new_tokens=2), 0) == []


def test_every_eos_id_ends_a_completion_and_length_is_only_the_limit() -> None:
    eos = {tiny.EOS, 7, 23, 38, 30, 12}
    params = SamplingParams(max_new_tokens=8)
    groups = sampler(eos=sorted(eos)).sample(PROMPTS, 60, params, seed=3)
    completions = [c for g in groups for c in g.completions]
    for c in completions:
        assert not eos & set(c.ids[:-1])
        assert c.finish_reason == ("stop" if c.ids[-1] in eos else "length")
        assert len(c.ids) == 8 or c.finish_reason == "stop"
        assert c.logp is not None and c.logp.shape == (len(c.ids),) and c.logp.isfinite().all()
    assert {c.ids[-1] for c in completions if c.finish_reason == "stop"} == eos
    assert any(c.finish_reason == "length" for c in completions)
    at_limit = [c for c in completions if len(c.ids) == 8 and c.ids[-1] in eos]
    assert at_limit and all(c.finish_reason == "stop" for c in at_limit)


def test_pad_and_eos_may_be_the_same_token() -> None:
    policy = Policy(tiny.model())
    params = SamplingParams(max_new_tokens=8)
    plain = GenerateSampler(policy, tiny.tokenizer(), [tiny.EOS, 7, 8, 9, 10])
    shared = GenerateSampler(policy, tiny.tokenizer(pad="<eos>"), [tiny.EOS, 7, 8, 9, 10])
    without = GenerateSampler(policy, tiny.tokenizer(pad=None), [tiny.EOS, 7, 8, 9, 10])
    expected = plain.sample(PROMPTS, 20, params, seed=3)
    for s in (shared, without):
        groups = s.sample(PROMPTS, 20, params, seed=3)
        assert ids(groups) == ids(expected)
        assert torch.equal(sampled_logp(groups), sampled_logp(expected))


def test_a_sampled_pad_token_is_a_token_like_any_other() -> None:
    """The pad id is in the vocabulary: it may be sampled, and a prompt may contain it."""
    policy = Policy(tiny.model())
    s = GenerateSampler(policy, tiny.tokenizer(), [tiny.EOS])
    groups = s.sample([[tiny.PAD, 5, tiny.PAD], [6]], 150, SamplingParams(max_new_tokens=6), 0)
    inner = [c for g in groups for c in g.completions if tiny.PAD in c.ids[:-1]]
    assert inner
    torch.testing.assert_close(sampled_logp(groups), policy_logp(policy, groups), rtol=0, atol=1e-5)


def test_greedy_takes_the_most_likely_token() -> None:
    model = tiny.model()
    params = SamplingParams(max_new_tokens=6, greedy=True, temperature=5.0, top_k=3, top_p=0.5)
    for prompt, group in zip(PROMPTS, sampler(model).sample(PROMPTS, 2, params, 0), strict=True):
        row = list(prompt)
        for _ in range(6):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] == tiny.EOS:
                break
        assert [list(c.ids) for c in group.completions] == [row[len(prompt) :]] * 2


def test_the_models_own_sampling_defaults_do_not_leak() -> None:
    model = tiny.model()
    params = SamplingParams(max_new_tokens=10)
    expected = sampler(model).sample(PROMPTS, 4, params, seed=1)
    config = model.generation_config
    config.update(
        do_sample=True,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        suppress_tokens=list(range(4, 30)),
        begin_suppress_tokens=[30],
        no_repeat_ngram_size=1,
        min_new_tokens=10,
        max_length=5,
        eos_token_id=[20, 21, 22],
        forced_eos_token_id=35,
        num_beams=3,
    )
    groups = sampler(model).sample(PROMPTS, 4, params, seed=1)
    assert ids(groups) == ids(expected)
    assert torch.equal(sampled_logp(groups), sampled_logp(expected))
    assert model.generation_config is config and config.suppress_tokens == list(range(4, 30))


def test_a_repetition_penalty_applies_to_prompt_and_completion_but_not_to_padding() -> None:
    s = sampler(eos=[tiny.VOCAB + 1])
    params = SamplingParams(max_new_tokens=12, repetition_penalty=1e6, greedy=True)
    together = s.sample(PROMPTS, 1, params, 0)
    for prompt, group in zip(PROMPTS, together, strict=True):
        (completion,) = group.completions
        assert len(set(completion.ids)) == 12 and not set(completion.ids) & set(prompt)
        (alone,) = s.sample([prompt], 1, params, 0)
        assert alone.completions[0].ids == completion.ids
        # A padding token under the penalty would weigh on the probabilities of all others.
        torch.testing.assert_close(sampled_logp([alone]), sampled_logp([group]), rtol=0, atol=1e-5)


def count_tokens(model: Any) -> list[tuple[int, int]]:
    """Records the shape ``(rows, tokens)`` of each forward of the decoder."""
    shapes: list[tuple[int, int]] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        given = kwargs.get("input_ids")
        shapes.append(tuple((args[0] if given is None else given).shape))

    model.get_decoder().register_forward_pre_hook(record, with_kwargs=True)
    return shapes


def test_a_prompt_is_prefilled_once_and_then_one_token_at_a_time() -> None:
    model = tiny.model()
    s = sampler(model, eos=[tiny.VOCAB + 1])
    shapes = count_tokens(model)
    s.sample([list(range(4, 24))] * 2, 5, SamplingParams(max_new_tokens=7), seed=0)
    assert shapes == [(2, 19)] + [(10, 1)] * 7


def test_a_wave_stops_when_all_its_completions_have_ended() -> None:
    model = tiny.model()
    s = sampler(model, eos=range(tiny.VOCAB))
    shapes = count_tokens(model)
    s.sample([[5, 6]], 3, SamplingParams(max_new_tokens=50), 0)
    assert shapes == [(1, 1), (3, 1)]


def test_dropout_and_checkpointing_are_off_while_sampling_and_modes_come_back() -> None:
    model = tiny.add_lora(tiny.model(), lora_dropout=0.5)
    base = model.get_base_model()
    params = SamplingParams(max_new_tokens=8)
    expected = sampler(model.eval()).sample(PROMPTS, 3, params, seed=1)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    base.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    trained = sampler(model)
    shapes = count_tokens(base)
    groups = trained.sample(PROMPTS, 3, params, seed=1)
    assert ids(groups) == ids(expected)
    assert [m.training for m in model.modules()] == modes
    assert all(tokens == 1 for _, tokens in shapes[1:]), "the cache was not used"
    assert base.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())


def test_it_looks_for_signals_before_each_token_and_leaves_the_model_as_it_was() -> None:
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 4:
            raise KeyboardInterrupt

    model = tiny.model().train()
    config = model.generation_config
    signals: Any = types.SimpleNamespace(check=check)
    interrupted = Execution(OOMRetry(0), signals=signals)
    with pytest.raises(KeyboardInterrupt):
        sampler(model, execution=interrupted).sample(
            [[5]], 2, SamplingParams(max_new_tokens=50), seed=0
        )
    assert checks == 4
    assert model.training and model.generation_config is config


def test_text_is_decoded_without_special_tokens() -> None:
    (group,) = sampler().sample([[5, 6]], 40, SamplingParams(max_new_tokens=5), seed=0)
    for c in group.completions:
        assert c.text == " ".join(f"w{i}" for i in c.ids if i >= 4)


@pytest.mark.parametrize("family", ["Mistral", "Gemma3"])
def test_prompts_longer_than_the_sliding_window_beside_short_ones(family: str) -> None:
    s = sampler(tiny.model(family))
    prompts = [list(range(4, 34)), [4], list(range(10, 16))]
    groups = s.sample(prompts, 2, SamplingParams(max_new_tokens=12), seed=0)
    torch.testing.assert_close(
        sampled_logp(groups), policy_logp(s.policy, groups), rtol=0, atol=1e-5
    )
