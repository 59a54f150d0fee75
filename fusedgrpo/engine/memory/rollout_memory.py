"""The memory of a rollout, measured on a model of few layers: by generate, and by our own decoder.

generate keeps keys and values of every sequence whole, prompt included, padded to the longest. Our
decoder keeps them in pages, a prompt's once for all its completions (``models/kv_cache.py``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.fake_layers import PagesStandIn, rounded
from fusedgrpo.engine.memory.measure import SmallModel
from fusedgrpo.kernels.launch import DECODE_SPLIT, tiling
from fusedgrpo.models.kv_cache import PAGE, pages_of
from fusedgrpo.models.token_chooser import BYTES_PER_LOGIT


class GenerateMemory(NamedTuple):
    """Bytes above the weights: of the cache when it is full, and the most beside it while a token
    is chosen; the most of all while prompts are read, which is before the cache is there."""

    entries: int
    prefill: int
    decoding: int

    @property
    def parts(self) -> dict[str, int]:
        """The peak, by kind."""
        if self.entries + self.decoding >= self.prefill:
            return {"KV cache": self.entries, "one token": self.decoding}
        return {"reading the prompts": self.prefill}


class DecoderMemory(NamedTuple):
    """Bytes above the weights: of the pages of keys and values, and the most beside them while
    prompts are read and while a token is chosen. Prompts are read as places fall free, so that the
    pages may be full by then."""

    entries: int
    prefill: int
    decoding: int

    @property
    def parts(self) -> dict[str, int]:
        """The peak, by kind."""
        if self.decoding >= self.prefill:
            return {"K/V pages": self.entries, "one token": self.decoding}
        return {"K/V pages": self.entries, "reading the prompts": self.prefill}


def generate_memory(
    model: SmallModel, *, rows: int, groups: int, prompt: int, length: int
) -> GenerateMemory:
    """The memory of ``rows`` sequences of ``length`` tokens, their ``groups`` prompts
    read together."""
    from transformers import DynamicCache

    tracker = model.tracker
    model.model.eval()
    with model.fake, tracker, torch.no_grad():
        before = tracker.live
        cache = DynamicCache(config=model.causal_lm.config)
        tracker.start_peak()
        _generate(model, groups, max(prompt - 1, 1), cache, 0)
        prefill = tracker.peak.bytes - before
        entries = 0
        for layer in cache.layers:
            for name in ("keys", "values"):
                kept: Tensor = getattr(layer, name)
                shape = (rows, kept.shape[1], length - 1, *kept.shape[3:])
                setattr(layer, name, kept.new_empty(shape))
                entries += math.prod(shape) // (length - 1) * length * kept.itemsize
        tracker.start_peak()
        held = tracker.live
        _generate(model, rows, 1, cache, length - 1)
        decoding = tracker.peak.bytes - held
    # A token is chosen under autocast, which keeps 16-bit copies of a float32 adapter.
    casts = sum(
        rounded(2 * p.numel())
        for p in model.model.parameters()
        if p.requires_grad and p.dtype == torch.float32 and model.dtype != torch.float32
    )
    choosing = rows * model.head_weight.shape[0] * BYTES_PER_LOGIT + casts
    return GenerateMemory(entries, prefill, max(decoding, choosing))


def _generate(model: SmallModel, rows: int, tokens: int, cache: Any, seen: int) -> None:
    ids, positions = torch.zeros(2, rows, tokens, dtype=torch.int64).unbind()
    with model.autocast():
        model.causal_lm.get_decoder()(
            input_ids=ids,
            position_ids=positions,
            attention_mask=torch.ones(rows, 1, tokens, seen + tokens, dtype=torch.bool),
            past_key_values=cache,
            use_cache=True,
        )


class Decoding(NamedTuple):
    """The longest case of our own decoder. rows: completions of ``most`` tokens in flight, of
    ``prompts`` prompts of ``prompt`` tokens. reads: prompts in one forward pass. logits: whether
    rows of logits are made to choose from."""

    rows: int
    prompts: int
    prompt: int
    most: int
    reads: int
    logits: bool

    @property
    def pages(self) -> int:
        """As the scheduler counts them: a completion's last token is never kept."""
        return self.prompts * pages_of(self.prompt) + self.rows * pages_of(self.most - 1)

    @property
    def splits(self) -> int:
        """Parts that the attention of a decode step cuts the keys of a row into."""
        lengths = self.prompt, self.most - 1
        return sum(-(-pages_of(length) * PAGE // DECODE_SPLIT) for length in lengths)


def needs_logits(config: GRPOConfig) -> bool:
    """Whether sampling filters by rank or by what was said, for which all logits of a row are
    needed; else tokens come straight from the hidden states (``kernels/sample``)."""
    return bool(config.top_k or config.top_p < 1 or config.min_p or config.repetition_penalty != 1)


def decoder_memory(model: SmallModel, asked: Decoding) -> DecoderMemory:
    """The memory of a rollout by our own decoder, whose longest case is ``asked``."""
    tracker = model.tracker
    model.model.eval()
    pages = PagesStandIn(asked.pages)
    # In one context of autocast, as there: its 16-bit copies of a float32 adapter stay.
    with model.fake, tracker, torch.no_grad(), model.autocast():
        before = tracker.live
        tracker.start_peak()
        model.forward(asked.reads * asked.prompt, fusedgrpo_pages=pages)
        prefill = tracker.peak.bytes
        pages.splits = asked.splits
        tracker.start_peak()
        states = model.forward(asked.rows, fusedgrpo_pages=pages).last_hidden_state[0]
        _choose(model, states, asked.logits)
        decoding = tracker.peak.bytes
        entries = pages.bytes
    return DecoderMemory(entries, prefill - before - entries, decoding - before - entries)


def _choose(model: SmallModel, states: Tensor, logits: bool) -> None:
    V, H = model.head_weight.shape
    if logits:
        states.new_empty(len(states) * V * BYTES_PER_LOGIT, dtype=torch.uint8)
        return
    tiles = tiling(H, V, model.dtype.itemsize, "cuda")
    states.new_empty((min(len(states), tiles.rows), min(tiles.columns, V)), dtype=torch.float32)
