"""Completions that have to match: drawn from the policy's distribution over the tokens that can
go on that way. The oracle is another library, which says of a text whether it may still match."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import pieces
import pytest
import regex
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_turns import ScriptedTurns
from torch import Tensor

from fusedgrpo.config.structured import StructuredOutputs
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout import decode_loop
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.structured import Grammar, _library
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.engine.rollout.warpers import only_allowed, warpers
from fusedgrpo.engine.seeding import derive
from fusedgrpo.errors import NonFiniteError, SamplerError
from fusedgrpo.kernels.sample.philox import gumbel_tile
from fusedgrpo.models.decode_graphs import StepGraphs
from fusedgrpo.models.policy import Policy

pytest.importorskip("llguidance")

TOKENIZER = pieces.tokenizer()
EOS = TOKENIZER.eos_token_id
SIZE = 272  # a few tokens more than the tokenizer has
PROMPTS = [[65, 66, 67, 68, 69, 70, 71], [64], [9, 9], [3, 30, 20] * 9]
WORDS = "(a|bc|12)*[0-9]?"


@functools.cache
def policy() -> Policy:
    return Policy(tiny.model("Qwen2", vocab_size=SIZE, scale=6.0))


def asks(most: int = 12, **options: Any) -> SamplingParams:
    kinds = {name: options.pop(name) for name in ("regex", "json", "choice", "grammar")
             if name in options}  # fmt: skip
    return SamplingParams(
        max_new_tokens=most, structured_outputs=StructuredOutputs(**kinds), **options
    )


def decoder(in_flight: int | None = None, tokenizer: Any = TOKENIZER) -> DecoderSampler:
    execution = Execution(OOMRetry(0, in_flight))
    return DecoderSampler(policy(), tokenizer, [EOS], execution=execution)


@functools.cache
def both() -> dict[str, Sampler]:
    generate = GenerateSampler(policy(), TOKENIZER, [EOS])
    return {"decoder": decoder(), "generate": generate}


def ids(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[c.ids for c in group.completions] for group in groups]


def of(groups: Sequence[Group]) -> list[Completion]:
    return [c for group in groups for c in group.completions]


def written(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens))


@functools.cache
def may_follow(pattern: str, said: str) -> Tensor:
    """``[SIZE]``: the tokens with which ``said`` is the beginning of a match; the EOS if it is
    one."""
    allowed = torch.zeros(SIZE, dtype=torch.bool)
    for token in range(len(TOKENIZER)):
        piece = written([token])
        if piece and piece.isascii() and not piece.startswith("<"):
            found = regex.fullmatch(pattern, said + piece, partial=True)
            allowed[token] = found is not None
    allowed[EOS] = regex.fullmatch(pattern, said) is not None
    return allowed


@torch.no_grad()
def expected(
    prompt: Sequence[int], completion: Completion, params: SamplingParams, seed: int
) -> tuple[list[int], list[float]]:
    """The tokens and log-probs of the model's own forward pass with the noise of ``seed``."""
    assert params.structured_outputs is not None
    pattern = params.structured_outputs.regex
    assert pattern is not None
    sequence = torch.tensor([[*prompt, *completion.ids]])
    with policy().scoring():
        scores = policy().model(input_ids=sequence).logits[0].float()
    tokens, logps = [], []
    for place in range(len(completion.ids)):
        at = len(prompt) + place
        allowed = may_follow(pattern, written(completion.ids[:place]))
        row = scores[at - 1 : at].masked_fill(~allowed, -torch.inf)
        row = warpers(params)(sequence[:, :at], row)
        logp = row.log_softmax(-1)
        if not params.greedy:
            noise = gumbel_tile(torch.tensor([seed]), torch.tensor([place]), 0, SIZE, row.dtype)
            row = row + noise
        tokens.append(int(row.argmax()))
        logps.append(float(logp[0, completion.ids[place]]))
    return tokens, logps


OPTIONS: list[dict[str, Any]] = [
    {},
    {"greedy": True},
    {"top_k": 3, "top_p": 0.9},
    {"min_p": 0.2, "repetition_penalty": 1.3, "temperature": 1.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_and_log_probs_are_those_of_the_models_own_masked_forward_pass(
    options: dict[str, Any],
) -> None:
    params = asks(regex=WORDS, **options)
    groups = decoder(in_flight=3).sample(PROMPTS, 2, params, seed=3)
    for i, group in enumerate(groups):
        for sample, completion in enumerate(group.completions):
            tokens, logp = expected(PROMPTS[i], completion, params, derive(3, i, sample))
            assert list(completion.ids) == tokens
            assert completion.logp is not None
            assert completion.logp.tolist() == pytest.approx(logp, abs=1e-5)
            ended = completion.ids[-1] == EOS
            assert completion.finish_reason == ("stop" if ended else "length")
            assert completion.text == written([t for t in completion.ids if t != EOS])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generate_draws_from_the_same_distribution(options: dict[str, Any]) -> None:
    params = asks(regex=WORDS, **options)
    groups = both()["generate"].sample(PROMPTS, 2, params, seed=3)
    for i, group in enumerate(groups):
        for completion in group.completions:
            _, logp = expected(PROMPTS[i], completion, params, 0)
            assert completion.logp is not None
            assert completion.logp.tolist() == pytest.approx(logp, abs=2e-5)
    if params.greedy:
        assert ids(groups) == ids(both()["decoder"].sample(PROMPTS, 2, params, seed=3))


@pytest.mark.parametrize("in_flight", [1, 2, 5])
def test_company_changes_nothing(in_flight: int) -> None:
    params = asks(regex=WORDS)
    alone = both()["decoder"].sample(PROMPTS, 3, params, seed=7)
    assert len({len(c.ids) for c in of(alone)}) > 1
    few = decoder(in_flight)
    assert ids(few.sample(PROMPTS, 3, params, seed=7)) == ids(alone)
    assert ids(few.sample(PROMPTS[2:], 3, params, seed=7, first=2)) == ids(alone)[2:]


SCHEMA = """{"type": "object", "properties": {"a": {"enum": ["yes", 12]}, "b": {"type": "null"}},
"required": ["a"], "additionalProperties": false, "x-guidance": {"whitespace_flexible": false}}"""


@pytest.mark.parametrize("name", ["decoder", "generate"])
@pytest.mark.parametrize(
    ("asked", "matches"),
    [
        ({"choice": ("yes", "yesno", "né")}, r"yes|yesno|né"),
        ({"json": SCHEMA}, r'\{"a":("yes"|12)(,"b":null)?\}'),
        ({"grammar": 'start: "a" NUM ("," NUM)?\nNUM: /[0-9]{1,2}/'}, r"a\d{1,2}(,\d{1,2})?"),
        ({"grammar": 'root ::= "ab" [0-9]'}, r"ab[0-9]"),
    ],
)
def test_what_has_ended_matches(name: str, asked: dict[str, Any], matches: str) -> None:
    found = of(both()[name].sample(PROMPTS, 4, asks(24, **asked), seed=1))
    assert len({c.text for c in found}) > 1
    for c in found:
        assert c.finish_reason == "stop" and regex.fullmatch(matches, c.text), c.text


PIECES = st.sampled_from(["a", "b?", "[a-c]", "(ab|c)", "12", "[0-9]{2}", "(yes|12)?", "(a|b)+"])


@pytest.mark.parametrize("name", ["decoder", "generate"])
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pattern=st.lists(PIECES, min_size=1, max_size=4).map("".join), seed=st.integers(0, 99))
def test_ended_or_cut_it_is_what_the_expression_says(name: str, pattern: str, seed: int) -> None:
    for c in of(both()[name].sample(PROMPTS[:2], 2, asks(6, regex=pattern), seed)):
        if c.finish_reason == "stop":
            assert c.ids[-1] == EOS and regex.fullmatch(pattern, c.text)
        else:
            assert len(c.ids) == 6 and regex.fullmatch(pattern, c.text, partial=True)


def test_the_end_is_allowed_where_it_matches_and_alone_where_nothing_follows() -> None:
    grammar = Grammar(StructuredOutputs(regex="a(b|12)?"), TOKENIZER, [EOS], SIZE)

    def allowed(*said: str) -> set[int]:
        matcher = grammar.matcher()
        for piece in said:
            grammar.said(matcher, TOKENIZER.convert_tokens_to_ids(piece))
        bits = grammar.allowed([matcher], torch.device("cpu"))
        return set(only_allowed(torch.zeros(1, SIZE), bits)[0].isfinite().nonzero()[:, 0].tolist())

    def tokens(*pieces: str) -> set[int]:
        return {TOKENIZER.convert_tokens_to_ids(piece) for piece in pieces}

    assert allowed() == tokens("a", "ab")
    assert allowed("a") == tokens("b", "1", "12", "<eos>")
    assert allowed("a", "1") == tokens("2")
    assert allowed("ab") == allowed("a", "12") == tokens("<eos>")
    with pytest.raises(SamplerError, match="structured_outputs: regex: "):
        allowed("b")


def test_what_ends_a_completion_is_no_text_of_a_match() -> None:
    """A token that is text to the library and an end to the sampler."""
    ends = [EOS, TOKENIZER.convert_tokens_to_ids("c")]
    sampler = DecoderSampler(policy(), TOKENIZER, ends)
    for c in of(sampler.sample(PROMPTS, 4, asks(30, regex="(c|a){2}[0-9]"), seed=1)):
        assert c.finish_reason == "stop" and c.ids[-1] in ends
        assert regex.fullmatch("(aa|ac|ca|cc)[0-9]c?", c.text), c.text
    beyond = Grammar(StructuredOutputs(regex="(12|b)"), TOKENIZER, [EOS], 200)
    bits = beyond.allowed([beyond.matcher()], torch.device("cpu"))
    row = only_allowed(torch.zeros(1, 250), bits)[0]
    texts = {written([t]) for t in row.isfinite().nonzero()[:, 0].tolist()}
    assert texts == {"1", "b"}, "12 is a token of the tokenizer, but not of the model"


def test_where_no_token_can_follow_it_says_so() -> None:
    few = TOKENIZER.convert_tokens_to_ids("z")
    grammar = Grammar(StructuredOutputs(regex="az"), TOKENIZER, [EOS], few)
    matcher = grammar.matcher()
    grammar.said(matcher, TOKENIZER.convert_tokens_to_ids("a"))
    with pytest.raises(SamplerError, match="no token of the model's can follow"):
        grammar.allowed([matcher], torch.device("cpu"))


def test_a_text_to_stop_at_ends_it_in_the_midst_of_a_match() -> None:
    params = asks(regex="(a|bc){4}1{9}", stop_strings=("1",))
    for sampler in both().values():
        for c in of(sampler.sample(PROMPTS, 3, params, seed=2)):
            assert c.finish_reason == "stop" and regex.fullmatch("(a|bc){4}1", c.text), c.text


def test_it_runs_without_a_step_behind_and_without_graphs() -> None:
    params = asks(regex=WORDS)
    alone = both()["decoder"].sample(PROMPTS, 3, params, seed=7)
    sampler = decoder()
    sampler.how = dataclasses.replace(sampler.how, behind=1, graphs=lambda: StepGraphs(_record))
    assert ids(sampler.sample(PROMPTS, 3, params, seed=7)) == ids(alone)


def _record(run: Any) -> Any:
    raise AssertionError("a step with a mask was recorded")


def test_memory_that_runs_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = asks(regex=WORDS)
    alone = both()["decoder"].sample(PROMPTS, 3, params, seed=7)
    sampler = decoder()
    plain, calls = decode_loop.RaggedDecoder.next, [0]

    def failing(self: Any, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in (3, 5):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return plain(self, *arguments)

    monkeypatch.setattr(decode_loop.RaggedDecoder, "next", failing)
    assert ids(sampler.sample(PROMPTS, 3, params, seed=7)) == ids(alone)
    assert sampler.execution.oom_retry.retries == 2


@pytest.mark.parametrize("name", ["decoder", "generate"])
def test_each_turn_matches_by_itself(name: str) -> None:
    given = (9, 9, 9)
    most = 30
    turns = ScriptedTurns(lambda place, turn: given if turn < 2 else None, most, patience=2)
    groups = both()[name].sample_turns(PROMPTS, 2, asks(most, regex="[ab]{1,3}[0-9]"), 5, turns)
    spans = {c.given for c in of(groups)}
    assert len(spans) > 1, "turns of different lengths"
    for c in of(groups):
        starts = [0, *(stop for _, stop in c.given)]
        stops = [*(start for start, _ in c.given), len(c.ids)]
        assert len(starts) == 3
        for start, stop in zip(starts, stops, strict=True):
            assert c.ids[stop - 1] == EOS
            assert regex.fullmatch("[ab]{1,3}[0-9]", written(c.ids[start : stop - 1]))


def test_warm_up_holds_the_masks_and_says_nothing() -> None:
    for sampler in both().values():
        assert sampler.warm_up(PROMPTS, 2, asks(50, regex="a"))


def test_one_fill_serves_all_rows_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, rows = Grammar.allowed, []

    def noting(self: Any, matchers: Any, device: Any) -> Tensor:
        rows.append(len(matchers))
        return plain(self, matchers, device)

    monkeypatch.setattr(Grammar, "allowed", noting)
    found = of(both()["decoder"].sample(PROMPTS, 3, asks(regex="[ab]{3}"), seed=1))
    assert rows[0] == 12 and len(rows) == max(len(c.ids) for c in found)
    assert sum(rows) == sum(len(c.ids) for c in found)


@pytest.mark.parametrize("kind", [DecoderSampler, GenerateSampler])
def test_logits_that_are_not_finite_are_what_they_are_without(kind: Any) -> None:
    on = Policy(tiny.model("Qwen2", vocab_size=SIZE))
    sampler = kind(on, TOKENIZER, [EOS])
    with torch.no_grad():
        on.causal_lm.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="data row 40, token 1"):
        sampler.sample(PROMPTS[:1], 2, asks(4, regex="[ab]{3}"), seed=0, rows=[40])


def test_nothing_of_it_is_imported_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    _library.cache_clear()
    try:
        assert decoder().sample(PROMPTS[:1], 1, SamplingParams(max_new_tokens=2), seed=1)
    finally:
        _library.cache_clear()


def test_the_config_and_how_to_sample_agree() -> None:
    plain = SamplingParams(max_new_tokens=4, greedy=True)
    assert (
        not plain.filters
        and dataclasses.replace(plain, structured_outputs=StructuredOutputs(regex="a")).filters
    )
