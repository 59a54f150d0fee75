"""A tokenizer of text: a byte-level BPE that has every byte and a few longer pieces."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MERGES = [
    ("1", "2"), ("a", "b"), ("ab", "c"), ("{", '"'), ('"', ":"), ("a", '":'), ("y", "e"),
    ("ye", "s"),
]  # fmt: skip


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Pieces, then ``<eos>`` and ``<pad>``; options: as of ``PreTrainedTokenizerFast``."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{"eos_token": "<eos>", "pad_token": "<pad>"} | options
    )
