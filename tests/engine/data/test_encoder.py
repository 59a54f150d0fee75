from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.data.encoder import PromptEncoder
from fusedgrpo.engine.data.formats import Prompt
from fusedgrpo.engine.data.rows import BadRowError
from fusedgrpo.errors import ConfigError, DataError, ModelError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "2+2?"}


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte, so that lengths can be counted."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


def encoder(
    chat_template: str | None = CHATML,
    *,
    vocab_size: int | None = None,
    context_length: int | None = None,
    **options: Any,
) -> PromptEncoder:
    return PromptEncoder(
        GRPOConfig(**options),
        byte_tokenizer(chat_template),
        vocab_size=vocab_size,
        context_length=context_length,
    )


def text_of(enc: PromptEncoder, prompt: Prompt) -> str:
    return enc.tokenizer.decode(enc.encode(prompt))


def test_messages_are_rendered_with_a_turn_to_answer() -> None:
    prompt = Prompt([USER], [USER])
    expected = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(encoder(), prompt) == expected


def test_an_assistant_turn_at_the_end_is_continued() -> None:
    messages = [USER, {"role": "assistant", "content": "It is"}]
    assert text_of(encoder(), Prompt(messages, messages)).endswith("<|im_start|>assistant\nIt is")


def test_the_system_prompt_is_for_rows_that_have_none() -> None:
    own = [{"role": "system", "content": "mine"}, USER]
    enc = encoder(system_prompt="Be brief.")
    assert text_of(enc, Prompt([USER], [USER])).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>"
    )
    assert text_of(enc, Prompt(own, own)).startswith("<|im_start|>system\nmine<|im_end|>")


def test_text_without_messages_is_verbatim() -> None:
    assert text_of(encoder(), Prompt("2+2?", None)) == "2+2?"


def test_chat_template_variables_reach_the_template() -> None:
    enc = encoder("{{ mood }}{{ messages[0].content }}", chat_template_kwargs={"mood": "glad "})
    assert text_of(enc, Prompt([USER], [USER])) == "glad 2+2?"


def test_alpaca_without_a_chat_template_is_verbatim_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    enc = encoder(None, template="qwen")
    for _ in range(2):
        assert text_of(enc, Prompt("2+2?", [USER])) == "2+2?"
    assert [record.getMessage() for record in caplog.records] == [
        "template has no effect: the tokenizer has no chat template, it is taken as it is.",
        "The tokenizer has no chat template: prompts are taken as they are.",
    ]


def test_what_needs_a_chat_template_is_refused_without_one() -> None:
    with pytest.raises(DataError, match="no chat template"):
        encoder(None).encode(Prompt([USER], [USER]))
    with pytest.raises(DataError, match="system_prompt cannot be applied"):
        encoder(None, system_prompt="x").encode(Prompt("2+2?", [USER]))
    with pytest.raises(BadRowError, match="a system message or a history"):
        encoder(None).encode(Prompt("2+2?", [{"role": "system", "content": "x"}, USER]))


def test_a_system_prompt_for_plain_text_is_refused() -> None:
    said = "system_prompt cannot be applied: `prompt` is plain text.*text_as_user_turn: true"
    with pytest.raises(DataError, match=said):
        encoder(system_prompt="x").encode(Prompt("2+2?", None))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen", None),
        ("llama3", "template 'llama3' does not fit this model"),
        ("qwem", "template 'qwem' is not known; the tokenizer's own is used. Did you mean 'qwen'?"),
    ],
)
def test_a_template_name_that_does_not_fit_is_said(
    name: str, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="fusedgrpo"):
        encoder(template=name)
    assert caplog.text.count("template") == 0 if said is None else said in caplog.text


def test_a_row_that_the_template_refuses_says_its_reason() -> None:
    enc = encoder("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRowError, match="the chat template refuses it: roles must alternate"):
        enc.encode(Prompt([USER], [USER]))


@pytest.mark.parametrize(
    ("options", "context", "limit", "why"),
    [
        ({"max_prompt_length": 9}, None, 9, "max_prompt_length"),
        ({"max_length": 30, "max_completion_length": 20}, None, 10, "max_length 30 - max_comp"),
        (
            {"max_completion_length": 24},
            32,
            8,
            "context of the model 32 - max_completion_length 24",
        ),
        ({"max_prompt_length": 9, "max_completion_length": 24}, 32, 8, "context of the model"),
    ],
)
def test_prompts_over_the_limit_are_refused_and_never_cut(
    options: dict[str, int], context: int | None, limit: int, why: str
) -> None:
    enc = encoder(context_length=context, **options)
    assert len(enc.encode(Prompt("x" * limit, None))) == limit
    reason = rf"has {limit + 1} tokens, the limit is {limit} \({why}"
    with pytest.raises(BadRowError, match=reason):
        enc.encode(Prompt("x" * (limit + 1), None))


def test_a_completion_that_fills_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match="No room for a prompt: context of the model 512"):
        encoder(context_length=512, max_completion_length=512)


def test_token_ids_outside_the_vocabulary_are_refused() -> None:
    (highest,) = encoder().encode(Prompt("z", None))
    assert encoder(vocab_size=highest + 1).encode(Prompt("z", None)) == (highest,)
    said = rf"token id {highest} \('z'\), the model has {highest} tokens"
    with pytest.raises(BadRowError, match=said):
        encoder(vocab_size=highest).encode(Prompt("!z", None))


def test_text_can_be_the_turn_of_a_user() -> None:
    enc = encoder(text_as_user_turn=True, system_prompt="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, USER]
    assert enc.encode(Prompt("2+2?", None)) == encoder().encode(Prompt(messages, messages))
    with pytest.raises(DataError, match="text_as_user_turn: the tokenizer has no chat template"):
        encoder(None, text_as_user_turn=True).encode(Prompt("2+2?", None))


def test_text_beside_a_chat_template_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    enc = encoder()
    for _ in range(2):
        enc.encode(Prompt("2+2?", None))
    assert caplog.text.count("text_as_user_turn: true") == 1
    caplog.clear()
    encoder(None).encode(Prompt("2+2?", None))
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    rendered = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"  # by the user
    enc = PromptEncoder(GRPOConfig(), tokenizer, vocab_size=None, context_length=None)
    enc.encode(Prompt(rendered, None))
    assert not caplog.records


def with_ends(bos: bool, eos: bool, template: str | None = None, **options: Any) -> PromptEncoder:
    """A tokenizer that puts its BOS and EOS around text."""
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    return PromptEncoder(GRPOConfig(**options), tokenizer, vocab_size=None, context_length=None)


@pytest.mark.parametrize(
    ("text", "ends", "template", "said"),
    [
        ("<s>a", (True, False), None, "'<s>' twice: the text has one.*prompt_add_special_tokens"),
        ("<s><s>a", (False, False), None, "'<s>' twice: the text has both"),
        ("<s>a", (False, False), "<s>{{ messages[0].content }}", "'<s>' twice: the chat template"),
        ("a", (False, True), None, "'</s>', .*the tokenizer adds it. prompt_add_special_tokens"),
        ("a</s>", (False, False), None, "'</s>', .*it is the end of the text"),
        ("a", (False, False), "{{ messages[0].content }}</s>", "'</s>', .*the chat template"),
        ("a", (True, False), None, None),
        ("<s>a", (False, False), None, None),
        ("a", (True, True), "<s>{{ messages[0].content }}", None),
    ],
)
def test_odd_ends_of_prompts_are_said_once(
    text: str,
    ends: tuple[bool, bool],
    template: str | None,
    said: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    enc = with_ends(*ends, template)
    messages = None if template is None else [{"role": "user", "content": text}]
    for _ in range(2):
        enc.encode(Prompt(text, messages))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (said is not None)
    assert said is None or re.search(said, told[0])


def test_the_tokenizer_can_be_kept_from_adding_special_tokens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    enc = with_ends(True, True, prompt_add_special_tokens=False)
    assert text_of(enc, Prompt("<s>a", None)) == "<s>a" and not caplog.records


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7]['content'] }}",
        "{{ raise_exception('no') }}",
        "{{ [] | first | upper }}{{ {}.x.y }}",
    ],
)
def test_whatever_a_template_raises_is_the_rows_fault(template: str) -> None:
    with pytest.raises(BadRowError):
        encoder(template).encode(Prompt([USER], [USER]))


def test_half_a_character_is_the_rows_fault() -> None:
    with pytest.raises(BadRowError, match=r"half a character, '\\ud83d' .*at position 4"):
        encoder().encode(Prompt("cut \ud83d", None))
    messages = [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}]
    with pytest.raises(BadRowError, match="half a character"):
        encoder().encode(Prompt(messages, messages))


@pytest.mark.parametrize("found", [[[1, 2]], np.array([1, 2]), torch.tensor([[1, 2]]), (1, 2)])
def test_ids_may_come_in_other_shapes(found: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    enc = encoder()
    monkeypatch.setattr(enc.tokenizer, "apply_chat_template", lambda *_, **__: {"input_ids": found})
    assert enc.encode(Prompt([USER], [USER])) == (1, 2)


def test_something_else_than_ids_is_the_rows_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    enc = encoder()
    for found in ("text", [[1], [2]], [None], {"input_ids": ["a"]}, 3):
        monkeypatch.setattr(
            enc.tokenizer, "apply_chat_template", lambda *_, answer=found, **__: answer
        )
        with pytest.raises(BadRowError):
            enc.encode(Prompt([USER], [USER]))


PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)


def test_a_template_that_wants_parts_gets_parts_and_another_one_text() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("2+", "2?")]}]
    for given in ([USER], parts):
        assert text_of(encoder(PARTS), Prompt(given, given)) == "<user>2+2?"
        assert "user\n2+2?<" in text_of(encoder(), Prompt(given, given))


def test_a_processor_encodes_text_with_its_own_template() -> None:
    class Lens(ProcessorMixin):
        def __init__(self, tokenizer: Any, chat_template: str | None = None):
            self.tokenizer = tokenizer
            self.chat_template = chat_template

    def made(processor: Any) -> PromptEncoder:
        return PromptEncoder(GRPOConfig(), processor, vocab_size=None, context_length=None)

    assert text_of(made(Lens(byte_tokenizer(), PARTS)), Prompt([USER], [USER])) == "<user>2+2?"
    own = Lens(byte_tokenizer(CHATML))
    assert made(own).encode(Prompt([USER], [USER])) == encoder().encode(Prompt([USER], [USER]))
    assert text_of(made(Lens(byte_tokenizer())), Prompt("2+2?", None)) == "2+2?"
    with pytest.raises(ModelError, match="Lens has no tokenizer"):
        made(Lens(None))
