"""A tiny policy that calls a tool as often as it answers: a Markov chain of words in a Qwen2.

What it says next depends on its last word alone, by a table; the layers add nothing until they are
trained. So whole runs with tools take milliseconds and every turn can be foretold in kind.
"""

from __future__ import annotations

import math
import os
from typing import Any

MARKS = ["<unk>", "<|im_end|>", "<pad>", "<|im_start|>"]
NUMBERS = [str(i) for i in range(20)]
WORDS = [
    *MARKS,
    *("user", "assistant", "system", "tool", "double", "it", "tools:", "is", "error", "start"),
    *("<tool_call>", "</tool_call>", '{"name":', '"double",', '"triple",', '"arguments":'),
    *('{"x":', "{}}", *(f"{i}}}}}" for i in range(4)), "oops}}"),
    *NUMBERS,
    # Words of the trial of a chat template: what is no word would be one token, whatever it is.
    *("fusedgrpo", '"fusedgrpo', "first", "other", 'first"}}', 'other"}}', "answer"),
]
EOS = WORDS.index("<|im_end|>")

# Turns of both roles, the calls of the assistant's, and what tools there are: in words.
TEMPLATE = """\
{% if tools %}<|im_start|> system tools: {% for t in tools %}{{ t.function.name }} {% endfor %}\
<|im_end|> {% endif %}\
{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} \
{% for c in m.tool_calls or [] %}<tool_call> {"name": "{{ c.function.name }}", "arguments": \
{{ c.function.arguments | tojson }}} </tool_call> {% endfor %}<|im_end|> {% endfor %}\
{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"""

# After a word, the words that may come, all as likely. Whatever is not here is followed by a
# number, and that by the end.
NEXT: dict[str, list[str]] = {
    "assistant": ["<tool_call>", "<tool_call>", "it"],
    "it": ["is"],
    "<tool_call>": ['{"name":'],
    '{"name":': ['"double",', '"double",', '"double",', '"triple",'],
    '"double",': ['"arguments":'],
    '"triple",': ['"arguments":'],
    '"arguments":': ['{"x":', '{"x":', '{"x":', "{}}"],
    '{"x":': ["1}}", "2}}", "3}}", "oops}}"],
    **{word: ["</tool_call>"] for word in ("1}}", "2}}", "3}}", "{}}", "oops}}")},
    "</tool_call>": ["<|im_end|>"],
    **{number: ["<|im_end|>"] for number in NUMBERS},
}


def tokenizer() -> Any:
    """A word is a token; with a chat template that tells of tools, calls and answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
    )
    made.chat_template = TEMPLATE
    return made


def model() -> Any:
    """In float32 and eval mode."""
    import torch
    import transformers

    size = len(WORDS)
    config = transformers.Qwen2Config(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=WORDS.index("<pad>"),
        bos_token_id=None,
    )
    torch.manual_seed(0)
    made = transformers.Qwen2ForCausalLM(config).eval()
    table = torch.full((size, size), math.log(1e-6))
    for i, word in enumerate(WORDS):
        for other in NEXT.get(word, NUMBERS):
            table[WORDS.index(other), i] = 0.0
    for other in ("<tool_call>", '"double",', '{"x":'):  # the likelier of their words
        for i, word in enumerate(WORDS):
            count = NEXT.get(word, []).count(other)
            if count:
                table[WORDS.index(other), i] = math.log(count)
    width = config.hidden_size
    with torch.no_grad():
        made.model.embed_tokens.weight.copy_(torch.eye(size, width))
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        made.lm_head.weight.zero_()
        made.lm_head.weight[:, :size] = table / math.sqrt(width)
    return made


PROMPTS = [
    {"prompt": [{"role": "user", "content": f"double {i}"}], "answer": str(2 * i)} for i in range(8)
]


class Counter:
    """An environment that counts: what it says is the row's, and its reward is its count."""

    def reset(self, answer: str = "", **row: object) -> str:
        self.start = self.count = int(answer) // 2
        return " start"

    def double(self, x: int) -> int:
        """Count by a number.

        Args:
            x: the number.
        """
        self.count += x
        return self.count

    def get_reward(self) -> float:
        return float(self.count - self.start)


class Quiet(Counter):
    """Another one, which says nothing first."""

    def reset(self, **row: object) -> None:  # type: ignore[override]
        self.start = self.count = 10


class Restless(Counter):
    """One that begins otherwise each time."""

    def reset(self, **row: object) -> str:  # type: ignore[override]
        super().reset(answer="4")
        return f" {os.getpid()}"


def undocumented(x: int) -> int:
    return x


def double(x: int) -> int:
    """Twice a number.

    Args:
        x: the number.
    """
    return 2 * x
