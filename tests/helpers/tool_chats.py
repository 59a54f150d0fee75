"""Chat templates with tools, and tokenizers that have their special tokens and one token a byte."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fusedgrpo.engine.data.chat import ChatTemplate
from fusedgrpo.engine.run_clock import RunClock

# Calls as Hermes and Qwen write them; a turn that is not the last one loses its reasoning.
CHATML = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
  {%- if m.role == 'tool' %}
    {%- if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>{{ m.content }}</tool_response>
    {%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
  {%- else %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>
{% endif %}{{ m.content | trim }}
    {%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")  # added, but not special, in Qwen's
_SPECIAL = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<\|\"\|>|\[/?[A-Z_]{3,}\]")


def tokenizer(template: str, **options: Any) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", *sorted(set(_SPECIAL.findall(template)))]
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    made.add_tokens([AddedToken(token, special=False) for token in _PLAIN])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        chat_template=template,
        **{"bos_token": "<bos>", "eos_token": "<eos>"} | options,
    )


def chat(
    template: str = CHATML, variables: dict[str, Any] | None = None, **options
) -> ChatTemplate:
    return ChatTemplate(tokenizer(template, **options), RunClock(datetime(2026, 1, 1)), variables)


def peer(name: str) -> str:
    """A template that TRL has; the test is skipped without TRL, or one that has it no more."""
    trl = pytest.importorskip("trl")
    file = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not file.exists():
        pytest.skip(f"TRL has no {name}.jinja")
    return file.read_text(encoding="utf-8")


def ids(chat: ChatTemplate, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def token(chat: ChatTemplate, text: str) -> int:
    (found,) = ids(chat, text)
    return found
