"""The decoder on a GPU: recorded steps, the host out of the way, the policy's own log-probs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from scripted_turns import ScriptedTurns

from fusedgrpo.engine.rollout.decode_loop import How
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.next_token import NextToken
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.turns import Answer, Place
from fusedgrpo.models.decode_graphs import StepGraphs
from fusedgrpo.models.packed_batch import PackedBatch, Pair
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.ragged_decode import Prompt, RaggedDecoder, Room, Row

pytestmark = pytest.mark.gpu

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 9], [3, 30, 20] * 9]
# How far a token's log-prob may be from the policy's: products of other shapes round otherwise.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.03}


def policy_on_gpu(family: str, dtype: torch.dtype, **config: Any) -> Policy:
    """Heads of 64, as kernels want them, under an adapter that does something."""
    built = tiny.model(family, scale=3.0, hidden_size=128, head_dim=64, **config)
    model = tiny.add_lora(built).cuda()
    return Policy(model, compute_dtype=None if dtype == torch.float32 else dtype)


def sample(
    on: Policy, how: How | None, params: SamplingParams, rollout_weights: Any = "adapter"
) -> Sequence[Any]:
    sampler = DecoderSampler(on, tiny.tokenizer(), [tiny.EOS], rollout_weights=rollout_weights)
    if how is not None:
        sampler.how = How(how.behind, how.graphs, sampler.how.weights)
    groups = sampler.sample(PROMPTS, 5, params, seed=4)
    return [(g.prompt_ids, c) for g in groups for c in g.completions]


@pytest.mark.parametrize("rollout_weights", ["adapter", "merged"])
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "Qwen3"])
def test_recorded_steps_give_the_tokens_and_log_probs_of_the_policy(
    family: str, dtype: torch.dtype, rollout_weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    on = policy_on_gpu(family, dtype)
    params = SamplingParams(max_new_tokens=70)
    graphs = StepGraphs()
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        found = sample(on, How(behind=1, graphs=lambda: graphs), params, rollout_weights)
    assert graphs.works and graphs.buckets, [r.getMessage() for r in caplog.records]
    said = torch.cat([c.logp for _, c in found])
    with on.scoring():
        pairs = [(ids, c.ids) for ids, c in found]
        expected = on.logprobs(PackedBatch.build(pairs, on.device, on.layout)).logp.cpu()
    assert (said - expected).abs().max() <= CLOSE[dtype]
    if dtype == torch.float32:
        plain = sample(on, How(), params, rollout_weights)
        same = [a.ids == b.ids for (_, a), (_, b) in zip(found, plain, strict=True)]
        # A token may turn where two are tied to rounding.
        assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_what_is_given_between_turns_is_read_beside_recorded_steps(
    family: str, dtype: torch.dtype
) -> None:
    on = policy_on_gpu(family, dtype, max_position_embeddings=512)
    params = SamplingParams(max_new_tokens=300)

    def answer(place: Place, turn: int) -> Answer:
        return None if turn > 1 else tuple(range(4, 4 + 7 * (1 + place[1])))

    turns = ScriptedTurns(answer, params.max_new_tokens, patience=5)
    ends = [tiny.EOS, 10, 20, 30]
    graphs = StepGraphs()
    sampler = DecoderSampler(on, tiny.tokenizer(), ends)
    sampler.how = How(behind=1, graphs=lambda: graphs, weights=sampler.how.weights)
    groups = sampler.sample_turns(PROMPTS, 5, params, 4, turns)
    found = [(g.prompt_ids, c) for g in groups for c in g.completions]
    assert graphs.works and any(len(c.given) == 2 for _, c in found)
    said = torch.cat([c.logp for _, c in found])
    with on.scoring():
        pairs = [Pair(ids, c.ids, c.given) for ids, c in found]
        expected = on.logprobs(PackedBatch.build(pairs, on.device, on.layout)).logp.cpu()
    assert (said - expected).abs().max() <= CLOSE[dtype]


@pytest.mark.parametrize(
    "options", [{"greedy": True}, {"top_k": 9, "repetition_penalty": 1.2}, {"top_p": 0.8}], ids=str
)
def test_options_of_sampling_are_recorded_too(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    on = policy_on_gpu("Llama", torch.float32)
    graphs = StepGraphs()
    params = SamplingParams(max_new_tokens=40, **options)
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        found = sample(on, How(behind=1, graphs=lambda: graphs), params)
    assert graphs.works and graphs.buckets, [r.getMessage() for r in caplog.records]
    plain = sample(on, How(), params)
    same = [a.ids == b.ids for (_, a), (_, b) in zip(found, plain, strict=True)]
    assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_waits_for_the_device(dtype: torch.dtype, graphs: bool) -> None:
    on = policy_on_gpu("Llama", dtype)
    choose = NextToken(on, SamplingParams(max_new_tokens=60))
    with torch.no_grad(), on.scoring(), on.autocast():
        decoder = RaggedDecoder(on, Room(30, 6, 60, 9), choose, StepGraphs() if graphs else None)
        prompt = Prompt(PROMPTS[0], list(decoder.cache.take(1)))
        decoder.read([prompt])
        rows = [Row(prompt, place, seed=place) for place in range(6)]
        decoder.first(rows)
        decoder.next(rows)  # compiles, and records
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            said = [decoder.next(rows) for _ in range(50)]
        finally:
            torch.cuda.set_sync_debug_mode(before)
    assert all(len(one.read()[0]) == 6 for one in said)
