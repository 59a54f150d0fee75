"""Texts that end a completion: the same completions, cut after the token that completes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.rollout.decode_loop import How
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.stop_texts import StopTexts
from fusedgrpo.errors import ConfigError
from fusedgrpo.models.policy import Policy

PROMPTS = [[5, 6, 7, 8], [4], [9, 9]]
PLAIN = SamplingParams(max_new_tokens=24)


def samplers() -> dict[str, Sampler]:
    policy = Policy(tiny.model("Llama"))
    made: dict[str, Sampler] = {
        "generate": GenerateSampler(policy, tiny.tokenizer(), [tiny.EOS]),
        "decoder": DecoderSampler(policy, tiny.tokenizer(), [tiny.EOS]),
    }
    few = DecoderSampler(
        policy, tiny.tokenizer(), [tiny.EOS], execution=Execution(OOMRetry(0, in_flight=2))
    )
    few.how = How(behind=1, weights=few.how.weights)
    made["two in flight, one step behind"] = few
    return made


def cut(ids: Sequence[int], stops: Sequence[str]) -> tuple[int, ...]:
    """The first tokens with a stop in their text, by decoding every beginning of ``ids``."""
    tokenizer = tiny.tokenizer()
    for k in range(1, len(ids) + 1):
        if any(stop in tokenizer.decode(ids[:k]) for stop in stops):
            return tuple(ids[:k])
    return tuple(ids)


@pytest.mark.parametrize("name", ["generate", "decoder", "two in flight, one step behind"])
def test_completions_are_those_without_it_cut_where_the_text_is_said(name: str) -> None:
    sampler = samplers()[name]
    whole = [c for g in sampler.sample(PROMPTS, 6, PLAIN, 3) for c in g.completions]
    longest = max((c.ids for c in whole), key=len)
    pair = tiny.tokenizer().decode(longest[3:5])  # said by two tokens
    assert " " in pair
    stops = (pair, "w1")  # the beginning of w10, w11, ...
    params = dataclasses.replace(PLAIN, stop_strings=stops)
    found = [c for g in sampler.sample(PROMPTS, 6, params, 3) for c in g.completions]
    assert [c.ids for c in found] == [cut(c.ids, stops) for c in whole]
    shorter = [len(c.ids) < len(w.ids) for c, w in zip(found, whole, strict=True)]
    assert any(shorter) and not all(shorter)
    for c, before in zip(found, whole, strict=True):
        assert c.logp is not None and before.logp is not None
        assert c.logp.tolist() == pytest.approx(before.logp[: len(c.ids)].tolist(), abs=1e-5)
        said = any(stop in c.text for stop in stops)
        assert c.finish_reason == ("stop" if said or c.ids[-1] == tiny.EOS else "length")


def test_a_text_may_end_inside_a_token_and_begin_inside_another() -> None:
    words = ["<unk>", "a", "b</ans", "wer>c", "wer", ">", "é", "x" * 9]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    stops = StopTexts(PreTrainedTokenizerFast(tokenizer_object=core), ["</answer>"])
    assert stops.cut([1, 2, 3, 1]) == 3 and stops.cut([2, 4, 1, 2, 4, 5, 1]) == 6
    assert stops.cut([1, 2, 4]) is None and not stops.ended([1, 2, 4])
    long = [7] * 60 + [2, 3]
    assert stops.ended(long) and not stops.ended([*long[:-1], 1])
    assert not StopTexts(None, []) and StopTexts(None, []).cut([1]) is None


def test_arguments_of_generate_become_options() -> None:
    given = {
        "top_k": 5, "min_p": 0.1, "max_new_tokens": 9, "stop": "\n\n", "do_sample": True,
        "top_p": None,
    }  # fmt: skip
    config = GRPOConfig(generation_kwargs=given)
    assert config == GRPOConfig(top_k=5, min_p=0.1, max_completion_length=9, stop_strings=["\n\n"])
    assert config == GRPOConfig(generation_kwargs='{"top_k": 5, "min_p": 0.1, "max_new_tokens": 9, '
                                '"stop": ["\\n\\n"]}')  # fmt: skip
    assert SamplingParams.of(config).stop_strings == ("\n\n",)
    with pytest.raises(ConfigError) as caught:
        GRPOConfig(generation_kwargs={"num_beams": 4, "bad_words_ids": [[1]], "top_p": 2}, top_k=3)
    for text in (
        "generation_kwargs.num_beams: not supported: completions are sampled, one by one",
        "generation_kwargs.bad_words_ids: not supported: of generate's arguments there are temp",
        "generation_kwargs.top_p: expected a number",
    ):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match=r"top_k and generation_kwargs.top_k are one option"):
        GRPOConfig(generation_kwargs={"top_k": 4}, top_k=3)
    with pytest.raises(ConfigError, match="stop_strings: an empty text"):
        GRPOConfig(stop_strings=["a", ""])
