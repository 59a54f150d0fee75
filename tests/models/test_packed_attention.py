"""Packed, shared, or one sequence at a time: the same log-probs and the same gradients."""

from __future__ import annotations

import copy
import functools

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgrpo.errors import ModelError
from fusedgrpo.models import packed_attention as attention
from fusedgrpo.models import packing_probe
from fusedgrpo.models.packed_attention import Plan, packed_attention
from fusedgrpo.models.packed_batch import PackedBatch, Segment
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.softcap import keep_softcap

GROUPS = st.lists(
    st.tuples(st.integers(1, 64), st.lists(st.integers(1, 64), min_size=1, max_size=16)),
    min_size=1,
    max_size=3,
)


def pairs_of(groups, seed=0):
    """(prompt, completion) pairs of groups given as (prompt length, completion lengths)."""
    g = torch.Generator().manual_seed(seed)

    def tokens(n):
        return torch.randint(0, tiny.VOCAB, (n,), generator=g).tolist()

    pairs = []
    for prompt, completions in groups:
        ids = tokens(prompt)
        pairs += [(ids, tokens(n)) for n in completions]
    return pairs


def logprobs_and_gradients(policy, batches, direction):
    """Of batches in turn: all log-probs, and the gradients of their product with ``direction``."""
    policy.model.zero_grad(set_to_none=True)
    logp = torch.cat([policy.logprobs(batch).logp for batch in batches])
    (logp * direction).sum().backward()
    return logp.detach(), {n: p.grad for n, p in policy.trainable()}


def assert_equal_to_one_at_a_time(policy, pairs, layout, tolerance=1e-5):
    direction = torch.randn(sum(len(c) for _, c in pairs))
    alone = [PackedBatch.build([pair], "cpu", "rows") for pair in pairs]
    want, want_grads = logprobs_and_gradients(policy, alone, direction)
    together = [PackedBatch.build(pairs, "cpu", layout)]
    got, grads = logprobs_and_gradients(policy, together, direction)
    assert (got - want).norm() <= tolerance * want.norm()
    whole = torch.cat([g.flatten() for g in want_grads.values()])
    for name, grad in grads.items():
        error = (grad - want_grads[name]).norm()
        assert error <= tolerance * max(want_grads[name].norm(), 1e-2 * whole.norm()), name


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(groups=GROUPS, seed=st.integers(0, 9), layout=st.sampled_from(["shared", "packed"]))
def test_any_groups_equal_one_sequence_at_a_time(groups, seed, layout):
    policy = Policy(tiny.model("Llama", scale=6.0))
    assert_equal_to_one_at_a_time(policy, pairs_of(groups, seed), layout)


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_equals_one_sequence_at_a_time(family, layout):
    policy = Policy(tiny.model(family, scale=6.0))
    assert policy.layout == "shared"
    # Buckets of several completions and of one, longer than any sliding window of theirs.
    groups = [(9, [5, 6, 1, 40, 2]), (1, [3]), (33, [12, 37])]
    assert_equal_to_one_at_a_time(policy, pairs_of(groups), layout)


@pytest.mark.parametrize(
    "how",
    [
        "plain",
        "checkpointing",
        "reentrant",
        "lora",
        pytest.param("compiled", marks=pytest.mark.slow),
        "eager",
    ],
)
def test_the_ways_in_which_models_are_wrapped(how):
    model = tiny.model("Qwen2", scale=6.0)
    if how == "eager":
        model.set_attn_implementation("eager")
    if how in ("checkpointing", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    if how == "lora":
        model = tiny.add_lora(model)
    if how == "compiled":
        for layer in model.get_decoder().layers:
            layer.compile(backend="aot_eager")
    policy = Policy(model.train())
    assert policy.layout == "shared"
    assert_equal_to_one_at_a_time(policy, pairs_of([(9, [5, 6, 1, 40]), (4, [3])]), "shared")


def test_bfloat16_is_no_worse_than_twice_one_at_a_time():
    model = tiny.model("Llama", scale=6.0)
    pairs = pairs_of([(30, [20, 31, 9, 26]), (7, [40, 3])])
    direction = torch.randn(sum(len(c) for _, c in pairs))
    alone = [PackedBatch.build([pair], "cpu", "rows") for pair in pairs]
    exact, exact_grads = logprobs_and_gradients(Policy(model), alone, direction)
    low = Policy(model, compute_dtype=torch.bfloat16)
    assert low.layout == "shared"

    def errors(batches):
        logp, grads = logprobs_and_gradients(low, batches, direction)
        off = torch.cat([(grads[n] - g).flatten() for n, g in exact_grads.items()])
        return (logp - exact).norm(), off.norm()

    plain, packed = errors(alone), errors([PackedBatch.build(pairs, "cpu", "shared")])
    for ours, theirs in zip(packed, plain, strict=True):
        assert 0 < ours <= 2 * theirs


def test_generation_is_what_it_was_before():
    model = tiny.model("Gemma2")
    keep_softcap(model)  # for which a policy takes another attention than some transformers do
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [3, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}

    def generate():
        out = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, pad_token_id=0, **options
        )
        return out.sequences, torch.stack(out.logits)

    before = generate()
    Policy(model)
    assert attention.installed(model)
    for a, b in zip(before, generate(), strict=True):
        assert torch.equal(a, b)


def test_an_attention_that_leaks_is_found_out(monkeypatch):
    """Completions that see each other: what packing without a plan would do."""
    monkeypatch.setattr(Plan, "__init__", leaky)
    policy = Policy(tiny.model("Llama"))
    assert policy.layout == "rows"
    with pytest.raises(ModelError, match=r"shared_prompt: on.*hidden states are off by"):
        Policy(tiny.model("Llama"), shared_prompt="on")


_init = Plan.__init__


def leaky(self, segments, device):
    _init(self, [Segment(0, sum(s.length for s in segments))], device)


def test_rounding_that_a_deep_model_amplifies_is_no_leak(monkeypatch, caplog):
    monkeypatch.setitem(packing_probe.TOLERANCE, torch.bfloat16, 1e-3)
    model = tiny.model("Qwen2", hidden_size=64, num_hidden_layers=28)
    assert Policy(model, compute_dtype=torch.bfloat16).layout == "shared"
    model = tiny.model("Qwen2", hidden_size=64, num_hidden_layers=28)
    monkeypatch.setattr(Plan, "__init__", leaky)
    assert Policy(model, compute_dtype=torch.bfloat16).layout == "rows"
    monkeypatch.setattr(Plan, "__init__", _init)
    # Where rounding would hide a leak, nothing is believed.
    monkeypatch.setattr(packing_probe, "MOST_ROUNDING", 1e-3)
    assert Policy(model, compute_dtype=torch.bfloat16).layout == "rows"
    assert "and rounding alone may move them by" in caplog.text
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


@pytest.mark.parametrize("layout", ["rows", "shared"])
def test_what_is_not_finite_in_one_layout_is_no_agreement(layout, monkeypatch):
    hidden = packing_probe._hidden

    def broken(policy, asked):
        states, windows = hidden(policy, asked)
        wrong = asked == layout and attention.installed(policy.causal_lm)
        return states * (torch.nan if wrong else 1.0), windows

    monkeypatch.setattr(packing_probe, "_hidden", broken)
    assert Policy(tiny.model("Llama")).layout == "rows"


def test_scores_are_capped_under_any_implementation():
    model = tiny.model("Gemma2", attn_logit_softcapping=0.5)
    model.set_attn_implementation("eager")
    ids = torch.arange(4, 20)[None]
    expected = model(ids).logits
    model.config._attn_implementation_internal = "sdpa"  # as transformers 5.17 chooses
    policy = Policy(model)
    assert policy.layout == "shared"
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_model_that_does_not_know_the_arguments_falls_back_and_says_why(caplog):
    model = tiny.model("Llama")
    decoder = model.get_decoder()
    forward = decoder.forward
    decoder.forward = lambda input_ids, attention_mask, use_cache: forward(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    policy = Policy(model)
    assert policy.layout == "rows" and not attention.installed(model)
    assert "LlamaForCausalLM takes one padded sequence per row: its forward pass" in caplog.text
    assert_equal_to_one_at_a_time(policy, pairs_of([(4, [5, 2])]), "rows")


def test_layers_that_are_no_attention_fall_back(caplog):
    model = tiny.model("Qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert Policy(model).layout == "rows"
    assert "layers of type linear_attention" in caplog.text


def test_a_model_that_looks_at_the_name_of_its_attention_is_left_alone(caplog):
    """Falcon takes its eager branch, with a mask made for SDPA, under any other name."""
    import transformers

    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.arange(4, 12)[None]
    before = model(ids).logits
    assert Policy(model).layout == "rows" and not attention.installed(model)
    assert torch.equal(model(ids).logits, before)
    assert "hidden states are off by" in caplog.text


def test_a_window_that_does_not_reach_the_attention_is_found_out(caplog):
    """PhiMoE applies its window by a mask alone; it is wider than the tokens of the question."""
    import transformers

    torch.manual_seed(0)
    config = transformers.PhimoeConfig(
        vocab_size=tiny.VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=64, num_local_experts=2,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    assert Policy(transformers.PhimoeForCausalLM(config).eval()).layout == "rows"
    assert "sliding window is not handed to its attention" in caplog.text


def test_an_unknown_argument_of_an_attention_is_not_swallowed():
    model = tiny.model("Llama")
    assert Policy(model).layout == "shared"
    layer = model.model.layers[0].self_attn
    q, kv = torch.randn(1, 2, 4, 8), torch.randn(1, 1, 4, 8)
    forward = functools.partial(attention._attention_forward, "sdpa", layer, q, kv, kv, None)
    plan = Plan([Segment(0, 4)], torch.device("cpu"))
    forward(fusedgrpo_plan=plan, position_ids=torch.arange(4), use_cache=False)
    with pytest.raises(NotImplementedError, match="attention with indices"):
        forward(fusedgrpo_plan=plan, indices=torch.arange(4))


def test_code_that_asks_for_the_name_during_generation_gets_the_real_one(monkeypatch):
    model = tiny.model("Llama")
    seen = []
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, *args, **kwargs):
        seen.append(module.config._attn_implementation)
        return original(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", spy)
    Policy(model)
    seen.clear()
    model.generate(torch.tensor([[4, 5]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert seen and set(seen) == {"sdpa"} and attention.installed(model)


def test_rotary_embeddings_that_depend_on_the_longest_neighbour_are_said(caplog):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny.model("Llama", max_position_embeddings=16, rope_parameters=rope)
    policy = Policy(model)
    policy.logprobs(policy.pack([([4, 5, 6], [7, 8])]))
    assert "rope_type" not in caplog.text
    for _ in range(2):
        policy.logprobs(policy.pack([([4, 5, 6], [7] * 20)]))
    assert caplog.text.count("rope_type dynamic: a sequence has 22 tokens, more than 16") == 1


def test_rows_that_repeat_get_the_sum_of_their_gradients():
    x = torch.randn(5, 3, requires_grad=True)
    rows = torch.tensor([0, 3, 3, 3, 1])
    g = torch.randn(5, 3)
    out = attention._GatherRows.apply(x, rows)
    (got,) = torch.autograd.grad(out, x, g)
    (want,) = torch.autograd.grad(x.index_select(0, rows), x, g)
    assert torch.equal(out, x[rows])
    torch.testing.assert_close(got, want)
    low = x.detach().bfloat16().requires_grad_()
    rows = torch.zeros(64, dtype=torch.int64)
    ones = torch.full((64, 3), 1.0 + 2**-7, dtype=torch.bfloat16)
    (got,) = torch.autograd.grad(attention._GatherRows.apply(low, rows), low, ones)
    assert torch.equal(got[0], torch.full((3,), 64.5, dtype=torch.bfloat16)), "rounded once"


def test_off_packs_whole_sequences():
    assert Policy(tiny.model(), shared_prompt="off").layout == "packed"
    assert Policy(tiny.model(), shared_prompt="on").layout == "shared"


# --- the function itself ---------------------------------------------------------------------


def spelled_out(q, k, v, segments, scaling, window, softcap):
    """Token by token, in float64."""
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for s in segments:
        for i in range(s.length):
            keys = [*range(s.prefix_start, s.prefix_start + s.prefix_length)]
            keys = (keys + list(range(s.start, s.start + i + 1)))[-(window or 10**9) :]
            for head in range(q.shape[1]):
                scores = q[0, head, s.start + i] @ k[0, head // groups, keys].T * scaling
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[0, head, s.start + i] = scores.softmax(-1) @ v[0, head // groups, keys]
    return out.transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_equals_its_definition(window, softcap):
    # Segments not in order, prefixes of different lengths, one longer than a bucket's slack.
    segments = [
        Segment(0, 4), Segment(4, 3, 0, 4), Segment(7, 40, 0, 4), Segment(47, 1, 0, 4),
        Segment(48, 2), Segment(50, 45, 48, 2), Segment(95, 20, 48, 2),
    ]  # fmt: skip
    T = 115
    q, k, v = (torch.randn(1, h, T, 8, dtype=torch.float64) for h in (4, 2, 2))
    plan = Plan(segments[::-1], torch.device("cpu"))
    got = packed_attention(
        torch.nn.Module(), q, k, v, plan, scaling=0.3, window=window, softcap=softcap
    )
    torch.testing.assert_close(got, spelled_out(q, k, v, segments, 0.3, window, softcap))


def test_the_ragged_form_for_one_kernel_covers_prefix_and_own():
    plan = Plan([Segment(2, 3, 0, 2), Segment(0, 2)], torch.device("cpu"))
    keys, cu_q, cu_k, max_q, max_k = plan.varlen
    assert keys.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert (cu_q.tolist(), cu_k.tolist()) == ([0, 2, 5], [0, 2, 7])
    assert (max_q, max_k) == (3, 5) and cu_q.dtype == cu_k.dtype == torch.int32


def test_short_segments_share_a_bucket_and_long_ones_only_with_their_like():
    segments = [Segment(0, 100), Segment(100, 80), Segment(180, 70), Segment(250, 30),
                Segment(280, 2), Segment(282, 9, 0, 100)]  # fmt: skip
    buckets, place = Plan(segments, torch.device("cpu")).buckets
    assert [(b.n, b.q, b.prefix[1]) for b in buckets] == [
        (2, 100, 0), (1, 70, 0), (2, 30, 0), (1, 9, 100),
    ]  # fmt: skip
    assert len(place) == 291


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Qwen3"])
def test_on_a_gpu_packed_equals_rows(family, dtype):
    # Heads of 64, as kernels want them.
    model = tiny.model(family, scale=3.0, hidden_size=128, head_dim=64).cuda()
    low = None if dtype == torch.float32 else dtype
    policy = Policy(model, compute_dtype=low)
    assert policy.layout == "shared"
    pairs = pairs_of([(33, [5, 64, 1, 40]), (9, [12, 37])])
    direction = torch.randn(sum(len(c) for _, c in pairs)).cuda()
    exact = Policy(copy.deepcopy(model).double())
    results = [
        logprobs_and_gradients(p, [PackedBatch.build(pairs, "cuda", layout)], direction.to(t))
        for p, layout, t in (
            (exact, "rows", torch.float64),
            (policy, "rows", torch.float32),
            (policy, "shared", torch.float32),
        )
    ]
    errors = []
    for logp, grads in results[1:]:
        off = torch.cat([(g - results[0][1][n]).flatten() for n, g in grads.items()])
        errors.append(((logp - results[0][0]).norm(), off.norm()))
    for plain, shared in zip(*errors, strict=True):
        assert shared <= 2 * plain + 1e-5 * results[0][0].norm()
