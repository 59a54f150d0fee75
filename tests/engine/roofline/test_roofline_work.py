"""The formulas of the roofline against what a real tiny model computes, and real tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import tiny
import torch
from counting import Cost

from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.roofline import work
from fusedgrpo.engine.roofline.cards import Card
from fusedgrpo.engine.roofline.shape import Attention, Shape
from fusedgrpo.engine.roofline.work import Asked, Span, Work
from fusedgrpo.models.loading import enable_checkpointing
from fusedgrpo.models.packed_batch import Pair
from fusedgrpo.models.policy import Policy

VOCAB, LAYERS = 600, 3
SIZES: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
}  # fmt: skip


def policy(*, lora: bool = True, checkpointing: bool = False, family: str = "Llama") -> Policy:
    model = tiny.model(family, scale=1.0, **SIZES)
    wrapped = tiny.add_lora(model, r=8) if lora else model
    if checkpointing:
        enable_checkpointing(model)
    return Policy(wrapped)


def tokens(count: int, first: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


PROMPTS = [tokens(11, 4), tokens(7, 30)]
PAIRS = [Pair(PROMPTS[i // 3], tokens(n, 60 + i)) for i, n in enumerate((9, 5, 12, 6, 3, 8))]


def counted(policy: Policy, *, gradients: bool, entropy: bool = False) -> tuple[int, int]:
    """FLOP of all products but those of attention, which the counter does not see; and N."""
    packed = policy.pack(PAIRS)
    with Cost() as cost:
        if gradients:
            policy.model.train()
            with policy.training():
                out = policy.logprobs(packed, entropy=True if entropy else "detached")
                assert out.entropy is not None
                (out.logp.sum() + (out.entropy.sum() if entropy else 0)).backward()
        else:
            with policy.scoring():
                policy.logprobs(packed)
    return cost.flops, len(packed.targets)


def without_attention(shape: Shape) -> Shape:
    return dataclasses.replace(shape, attention=())


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Phi3"])
@pytest.mark.parametrize("lora", [True, False])
def test_scoring_is_what_a_model_computes(family: str, lora: bool) -> None:
    run = policy(lora=lora, family=family)
    flops, scored = counted(run, gradients=False)
    shape = without_attention(Shape.of(run.causal_lm, 4))
    assert work.forward(shape, work.spans(PAIRS, run.layout), scored).flops == flops


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_an_update_is_what_a_model_computes(lora: bool, entropy: bool) -> None:
    run = policy(lora=lora)
    flops, scored = counted(run, gradients=True, entropy=entropy)
    shape = without_attention(Shape.of(run.causal_lm, 4))
    found = work.update(
        shape, work.spans(PAIRS, run.layout), scored, checkpointing=False, entropy_gradient=entropy
    )
    assert found.flops == pytest.approx(flops, rel=0.02 if entropy and not lora else 1e-9)


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_computed_again_leaves_out_the_last_product_of_a_layer(lora: bool) -> None:
    """Checkpoints stop where all that was saved is there again. With an adapter that is behind the
    first product of the last layer's adapters."""
    run = policy(lora=lora, checkpointing=True)
    flops, scored = counted(run, gradients=True)
    shape = without_attention(Shape.of(run.causal_lm, 4))
    assert sum(p.closes for p in shape.products) == LAYERS
    found = work.update(shape, work.spans(PAIRS, run.layout), scored, checkpointing=True)
    assert found.flops == flops


@pytest.mark.parametrize("weights", ["merged", "adapter"])
def test_a_rollout_is_what_the_decoder_computes(weights: Any) -> None:
    run = policy()
    sampler = DecoderSampler(run, tiny.tokenizer(vocab=VOCAB), [-1], rollout_weights=weights)
    params = SamplingParams(max_new_tokens=9)
    sampler.weights_changed()  # as after each update
    with run.scoring(), Cost() as cost:
        groups = sampler.sample(PROMPTS, 3, params, 0)
    asked = [Asked(len(g.prompt_ids), [len(c.ids) for c in g.completions]) for g in groups]
    assert [group.lengths for group in asked] == [[9] * 3] * 2
    shape = Shape.of(run.causal_lm, 4)
    sampled = shape.merged() if weights == "merged" else shape.beside()
    parts = [work.read_prompts(sampled, asked), work.decode(sampled, asked)]
    parts += [work.merge(shape)] if weights == "merged" else []
    # Heads of first tokens are of completions there, and of prompts here; attention is in both.
    assert sum(part.flops for part in parts) == pytest.approx(cost.flops, rel=0.02)


def test_attention_takes_4_and_8_flop_for_a_pair_and_element() -> None:
    width, length = 6, 5
    q, k, v = (torch.randn(length, width, requires_grad=True) for _ in range(3))
    with Cost() as cost:
        out = (q @ k.T) @ v
        forward = cost.flops
        out.sum().backward()
    pairs = length * length
    batch = [Span(1, length - 1)] * length  # each sees all of them
    shape = Shape((), (Attention(width, 2 * width),), 1, 1, 0, 4)
    assert forward == 4 * width * pairs == work.forward(shape, batch, 0).flops
    both = work.update(shape, batch, 0, checkpointing=False).flops
    assert cost.flops == 12 * width * pairs == both
    again = work.update(shape, batch, 0, checkpointing=True).flops
    assert again == both + forward


@pytest.mark.parametrize("window", [None, 1, 4, 11, 12, 40])
@pytest.mark.parametrize("span", [Span(7), Span(7, 5), Span(0, 9), Span(1)])
def test_who_sees_whom(window: int | None, span: Span) -> None:
    length, before = span
    mask = torch.ones(length, before + length).tril(before)
    if window is not None:
        mask = mask.triu(before - window + 1)
    assert work.seen(span, window) == mask.sum()


def test_spans_are_what_a_packed_batch_forwards() -> None:
    run = policy()
    for layout in ("shared", "packed"):
        run.layout = layout
        segments = run.pack(PAIRS).segments
        found = [Span(s.length, s.prefix_length) for s in segments]
        assert sorted(found) == sorted(work.spans(PAIRS, layout))


@pytest.mark.parametrize("window", [None, 6])
def test_decoding_reads_what_step_after_step_reads(window: int | None) -> None:
    run = policy()
    shape = Shape.of(run.causal_lm, 4)
    attention = tuple(layer._replace(window=window) for layer in shape.attention)
    shape = dataclasses.replace(shape, attention=attention)
    groups = [Asked(11, [9, 4, 1]), Asked(5, [2, 2, 2])]
    expected = Work()
    for own in range(1, 9):
        live = [(g, sum(length > own for length in g.lengths)) for g in groups]
        here = [work.step(shape, rows, 1, group.prompt, own) for group, rows in live if rows]
        expected += sum(here[1:], here[0])
        # The weights are read for all groups together.
        again = len(here) - 1
        expected += Work(0, -again * (shape.layer_bytes + shape.head_bytes))
    found = work.decode(shape, groups)
    assert (found.flops, found.nbytes) == (expected.flops, expected.nbytes)


def test_weights_are_read_more_often_where_fewer_are_in_flight() -> None:
    shape = Shape.of(policy().causal_lm, 4)
    groups = [Asked(5, [9, 9, 9, 9])]
    weights = shape.layer_bytes + shape.head_bytes
    all_at_once, two = (work.decode(shape, groups, n).nbytes for n in (4, 2))
    assert two - all_at_once == 8 * weights
    assert work.decode(shape, groups).nbytes == all_at_once


def test_bytes_are_those_of_the_tensors() -> None:
    run = policy()
    model = run.causal_lm
    shape = Shape.of(model, 4)
    own = [m for n, m in model.get_decoder().named_parameters() if m.dim() > 1 and "embed" not in n]
    assert shape.layer_bytes == sum(p.nbytes for p in own)
    assert shape.head_bytes == model.get_output_embeddings().weight.nbytes
    cache = model(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
    entries = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.entry_bytes * len(PROMPTS[0]) == entries

    once = work.forward(shape, [Span(4)], 4)
    assert once.nbytes == shape.layer_bytes + shape.head_bytes
    both = work.update(shape, [Span(4)], 4, checkpointing=False)
    gradients = sum(p.nbytes for _, p in run.trainable())
    assert both.nbytes == once.nbytes + shape.layer_bytes + gradients
    dense = sum(m.weight.nbytes for m in model.get_decoder().modules() if hasattr(m, "base_layer"))
    assert shape.merged().layer_bytes == dense == work.merge(shape).nbytes - shape.layer_bytes


def test_launches_are_of_a_layer_and_the_head() -> None:
    shape = Shape.of(policy().causal_lm, 4)
    # q k v, o, gate up, down; two factors beside each; attention.
    assert work.forward(shape, [Span(4)], 4).launches == LAYERS * (4 + 8 + 1) + 1
    assert work.forward(shape.merged(), [Span(4)], 4).launches == LAYERS * (4 + 1) + 1
    once = work.forward(shape, [Span(4)], 4).launches
    both = work.update(shape, [Span(4)], 4, checkpointing=False).launches
    assert both == once + LAYERS * (4 + 16 + 1) + 1
    again = work.update(shape, [Span(4)], 4, checkpointing=True).launches
    assert again == both + LAYERS * (3 + 6 + 1 + 1)
    four = work.decode(shape.merged(), [Asked(3, [5, 5])]).launches
    assert four == 4 * (LAYERS * 5 + 1)


def test_the_bound_is_whichever_takes_longer() -> None:
    card = Card("x", flops=10.0, bandwidth=2.0)
    assert Work(30, 2).seconds(card) == 3
    assert Work(30, 8, 1000).seconds(card) == 4
