"""The memory of a rollout by generate, measured on a model of few layers.

generate keeps keys and values of every sequence whole, prompt included, padded to the longest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.engine.memory.fake_layers import rounded
from fusedgrpo.engine.memory.measure import SmallModel
from fusedgrpo.models.token_chooser import BYTES_PER_LOGIT


class GenerateMemory(NamedTuple):
    """Bytes above the weights: of the cache when it is full, and the most beside it while a token
    is chosen; the most of all while prompts are read, which is before the cache is there."""

    entries: int
    prefill: int
    decoding: int
    recorded: int = 0  # nothing is replayed

    @property
    def parts(self) -> dict[str, int]:
        """The peak, by kind."""
        if self.entries + self.decoding >= self.prefill:
            return {"KV cache": self.entries, "one token": self.decoding}
        return {"reading the prompts": self.prefill}


def generate_memory(
    model: SmallModel, *, rows: int, groups: int, prompt: int, length: int
) -> GenerateMemory:
    """The memory of ``rows`` sequences of ``length`` tokens, their ``groups`` prompts
    read together."""
    from transformers import DynamicCache

    tracker = model.tracker
    model.model.eval()
    with model.fake, tracker, model.kernels(), torch.no_grad():
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
