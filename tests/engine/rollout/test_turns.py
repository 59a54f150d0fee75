"""Completions of several turns: what is given between them is read, and only read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tiny
import torch
from scripted_turns import ScriptedTurns
from torch import Tensor

from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout import decode_loop
from fusedgrpo.engine.rollout.decode_loop import How
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.turns import Answer, Place
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.engine.rollout.warpers import warpers
from fusedgrpo.engine.seeding import derive
from fusedgrpo.kernels.sample.philox import gumbel_tile
from fusedgrpo.models.kv_cache import PagedCache
from fusedgrpo.models.packed_batch import Pair
from fusedgrpo.models.policy import Policy

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [4], [9, 9], [3, 30, 20] * 9]
FAMILIES = ["Llama", "Qwen2", "Qwen3", "Gemma2", "Phi3", "Mistral"]
MOST = 90
ENDS = [tiny.EOS, 10, 20, 30]


def answer(place: Place, turn: int) -> Answer:
    """Two answers of different lengths, the second one without a word; then the end, either way."""
    i, k = place
    if turn >= 2:
        return None if k else (7,) * MOST
    return tuple((11 * i + 5 * k + 3 * turn + j) % 30 + 5 for j in range(1 + (i + k) % 3 * 9))


def decoder(on: Policy, behind: int = 0, in_flight: int | None = None) -> DecoderSampler:
    execution = Execution(OOMRetry(0, in_flight))
    sampler = DecoderSampler(on, tiny.tokenizer(), ENDS, execution=execution)
    sampler.how = How(behind=behind, weights=sampler.how.weights)
    return sampler


def sampled(sampler: Sampler, params: SamplingParams, **options: Any) -> list[Group]:
    turns = ScriptedTurns(answer, params.max_new_tokens, **options)
    groups = sampler.sample_turns(PROMPTS, 3, params, 5, turns)
    assert sorted(turns.over) == [(i, k) for i in range(len(PROMPTS)) for k in range(3)]
    assert all(
        turns.over[i, k] == c.ids for i, g in enumerate(groups) for k, c in enumerate(g.completions)
    )
    return groups


def ids(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[c.ids for c in group.completions] for group in groups]


def policys_logp(on: Policy, groups: Sequence[Group]) -> Tensor:
    pairs = [Pair(g.prompt_ids, c.ids, c.given) for g in groups for c in g.completions]
    with on.scoring():
        return on.logprobs(on.pack(pairs)).logp


def own(completion: Completion) -> list[int]:
    given = {t for start, stop in completion.given for t in range(start, stop)}
    return [t for t in range(len(completion.ids)) if t not in given]


@torch.no_grad()
def expected(
    on: Policy, prompt: Sequence[int], completion: Completion, params: SamplingParams, seed: int
) -> list[int]:
    """What the model's own forward pass over the whole conversation and the noise of ``seed`` say
    at each place of the policy's own."""
    sequence = torch.tensor([[*prompt, *completion.ids]])
    with on.scoring():
        scores = on.model(input_ids=sequence).logits[0].float()
    chain, tokens = warpers(params), []
    for place in own(completion):
        at = len(prompt) + place
        row = chain(sequence[:, :at], scores[at - 1 : at].clone())
        row = row + gumbel_tile(
            torch.tensor([seed]), torch.tensor([place]), 0, row.shape[1], row.dtype
        )
        tokens.append(int(row.argmax()))
    return tokens


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_word_is_said_after_the_whole_conversation(family: str, behind: int) -> None:
    on = Policy(tiny.model(family))
    params = SamplingParams(max_new_tokens=MOST)
    groups = sampled(decoder(on, behind), params, patience=3)
    completions = [c for g in groups for c in g.completions]
    assert {len(c.given) for c in completions} >= {2}
    assert all(c.calls in (len(c.given), len(c.given) + 1) for c in completions)
    said = torch.cat([c.logp for c in completions])  # type: ignore[misc]
    assert (said - policys_logp(on, groups)).abs().max() <= 1e-5
    for i, group in enumerate(groups):
        for k, completion in enumerate(group.completions):
            seed = derive(5, i, k)
            assert completion.logp is not None
            assert len(completion.logp) == completion.own_tokens == len(own(completion))
            assert [completion.ids[t] for t in own(completion)] == expected(
                on, group.prompt_ids, completion, params, seed
            )
            for turn, (start, stop) in enumerate(completion.given):
                assert completion.ids[start:stop] == answer((i, k), turn)
                assert completion.ids[start - 1] in ENDS


def test_when_an_answer_comes_changes_nothing() -> None:
    on = Policy(tiny.model())
    params = SamplingParams(max_new_tokens=MOST)
    at_once = ids(sampled(decoder(on), params))
    for behind, in_flight, seed in [(0, None, 1), (1, None, 2), (0, 2, 3), (1, 1, 4), (1, 5, 5)]:
        late = sampled(decoder(on, behind, in_flight), params, patience=6, seed=seed)
        assert ids(late) == at_once


def test_a_repetition_penalty_sees_what_was_given() -> None:
    on = Policy(tiny.model())
    params = SamplingParams(max_new_tokens=MOST, repetition_penalty=1.3)
    groups = sampled(decoder(on, behind=1), params, patience=2)
    assert any(c.given for g in groups for c in g.completions)
    for i, group in enumerate(groups):
        for k, c in enumerate(group.completions):
            said = [c.ids[t] for t in own(c)]
            assert said == expected(on, group.prompt_ids, c, params, derive(5, i, k))


def test_a_long_answer_is_read_in_parts() -> None:
    on = Policy(tiny.model(max_position_embeddings=512))
    most = 400

    def long(place: Place, turn: int) -> Answer:
        return None if turn else tuple(j * (3 + place[0]) % 35 + 4 for j in range(290))

    def all_of(sampler: Sampler) -> list[Group]:
        return sampler.sample_turns(
            PROMPTS, 2, SamplingParams(max_new_tokens=most), 1, ScriptedTurns(long, most)
        )

    groups = all_of(decoder(on))
    completions = [c for g in groups for c in g.completions]
    assert any(c.given for c in completions)
    said = torch.cat([c.logp for c in completions])  # type: ignore[misc]
    assert (said - policys_logp(on, groups)).abs().max() <= 1e-5


@pytest.mark.parametrize("in_flight", [None, 2])
def test_pages_come_back(monkeypatch: pytest.MonkeyPatch, in_flight: int | None) -> None:
    made: list[PagedCache] = []

    class Watched(PagedCache):
        def __init__(self, pages: int):
            super().__init__(pages)
            made.append(self)

    on = Policy(tiny.model())
    sampler = decoder(on, 1, in_flight)
    monkeypatch.setattr("fusedgrpo.models.ragged_decode.PagedCache", Watched)
    sampled(sampler, SamplingParams(max_new_tokens=MOST), patience=4)
    (cache,) = made
    assert cache.free == cache.pages - 1, "all but the spare one"


def test_memory_that_runs_out_begins_conversations_again(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Policy(tiny.model())
    params = SamplingParams(max_new_tokens=MOST)
    alone = ids(sampled(decoder(on), params))
    plain, calls = decode_loop.RaggedDecoder.extend, [0]

    def failing(self: Any, rows: Any, *more: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return plain(self, rows, *more)

    monkeypatch.setattr(decode_loop.RaggedDecoder, "extend", failing)
    sampler = decoder(on)
    assert ids(sampled(sampler, params, patience=1)) == alone
    assert sampler.execution.oom_retry.retries == 2


def test_a_stop_text_that_was_given_ends_no_turn() -> None:
    on = Policy(tiny.model())

    def script(place: Place, turn: int) -> Answer:
        return None if turn else (20, 21)

    def turns_of(stop: tuple[str, ...]) -> list[Group]:
        params = SamplingParams(max_new_tokens=MOST, stop_strings=stop)
        return decoder(on).sample_turns(PROMPTS, 2, params, 5, ScriptedTurns(script, MOST))

    assert ids(turns_of(("w20 w21",))) == ids(turns_of(()))


@pytest.mark.parametrize("kind", ["generate", "base"])
def test_a_sampler_that_knows_no_turns_takes_one_after_the_other(kind: str) -> None:
    on = Policy(tiny.model())
    sampler: Sampler = GenerateSampler(on, tiny.tokenizer(), ENDS)
    if kind == "base":
        ours = decoder(on)

        class Plain(Sampler):
            def sample(self, *args: Any, **options: Any) -> list[Group]:
                return ours.sample(*args, **options)

        sampler = Plain()
    groups = sampled(sampler, SamplingParams(max_new_tokens=MOST), patience=3)
    assert ids(groups) == ids(sampled(sampler, SamplingParams(max_new_tokens=MOST)))
    completions = [c for g in groups for c in g.completions]
    assert {len(c.given) for c in completions} >= {2}
    assert max(len(c.ids) for c in completions) <= MOST
    said = torch.cat([c.logp for c in completions])  # type: ignore[misc]
    assert (said - policys_logp(on, groups)).abs().max() <= 1e-5
    for i, group in enumerate(groups):
        for k, c in enumerate(group.completions):
            for turn, (start, stop) in enumerate(c.given):
                assert c.ids[start:stop] == answer((i, k), turn)
    cut = [c for c in completions if c.finish_reason == "length"]
    assert all(len(c.ids) == MOST for c in cut)
