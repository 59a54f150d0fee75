"""The memory of a rollout by our own decoder, measured on a model of few layers.

Keys and values are kept in pages, a prompt's once for all its completions (``models/kv_cache.py``).
Layers compute as ``models/adapters/rollout_weights.py`` lets them, which is what runs here, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusedgrpo.engine.memory.fake_layers import PagesStandIn, called_by_us, rounded
from fusedgrpo.engine.memory.measure import SmallModel
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.warpers import only_allowed, warpers
from fusedgrpo.kernels.launch import DECODE_SPLIT, tiling
from fusedgrpo.kernels.sample import best
from fusedgrpo.kernels.sample.logits import COLUMNS, LAUNCHED, ROWS
from fusedgrpo.kernels.sample.noise import Noise
from fusedgrpo.models.adapters.merged_weights import MergedWeights
from fusedgrpo.models.adapters.plain_lora import plain_layers
from fusedgrpo.models.adapters.rollout_weights import AdapterWeights, RolloutWeights
from fusedgrpo.models.head import Head, find_head, logits
from fusedgrpo.models.kv_cache import PAGE, pages_of


class DecoderMemory(NamedTuple):
    """Bytes above what stays: of the pages of keys and values; while the adapters are prepared or
    merged, which is before there are pages; and the most beside the pages while prompts are read
    and while a token is chosen. Prompts are read as places fall free, so that the pages may be full
    by then. recorded: of a step that is replayed as a CUDA graph, which keeps them while it is
    there, tensors or not (models/decode_graphs.py)."""

    entries: int
    renewal: int
    prefill: int
    decoding: int
    recorded: int

    @property
    def parts(self) -> dict[str, int]:
        """The peak, by kind."""
        if self.renewal > self.entries + max(self.prefill, self.decoding):
            return {"weights for the rollout": self.renewal}
        if self.decoding >= self.prefill:
            return {"K/V pages": self.entries, "one token": self.decoding}
        return {"K/V pages": self.entries, "reading the prompts": self.prefill}


class Decoding(NamedTuple):
    """The longest case of our own decoder. rows: completions in flight, of ``prompts`` prompts of
    ``prompt`` tokens. reads: prompts in one forward pass. params: how tokens are chosen, and how
    many at most."""

    rows: int
    prompts: int
    prompt: int
    reads: int
    params: SamplingParams

    @property
    def pages(self) -> int:
        """As the scheduler counts them: a completion's last token is never kept. One page is spare:
        rows that only fill up a recorded step write there."""
        own = pages_of(self.params.max_new_tokens - 1)
        return self.prompts * pages_of(self.prompt) + self.rows * own + 1

    @property
    def splits(self) -> int:
        """Parts that the attention of a decode step cuts the keys of a row into."""
        lengths = self.prompt, self.params.max_new_tokens - 1
        return sum(-(-pages_of(length) * PAGE // DECODE_SPLIT) for length in lengths)


class DecoderModel:
    """A model of few layers, as our own decoder runs it; its layers learn what they share here."""

    def __init__(self, small: SmallModel, *, merged: bool):
        self.small = small
        self.weights: RolloutWeights | None = None
        if small.adapted:
            self.weights = (MergedWeights if merged else AdapterWeights)(small)
            with self._running(), self.weights.learn():
                small.forward(1, fusedgrpo_pages=PagesStandIn(1))
            with self._running(), self.weights.active():
                pass  # what was never there before is made another way
        # A layer in 4 bits is dequantised, whole, before an adapter is merged into it.
        self._dequantised = 0
        if self.weights is not None and merged and small.four_bit:
            sizes = (layer.in_features * layer.out_features for layer in plain_layers(small))
            self._dequantised = rounded(max(sizes, default=0) * small.dtype.itemsize)

    def memory(self, asked: Decoding) -> DecoderMemory:
        """The bytes of a rollout whose longest case is ``asked``."""
        small, tracker = self.small, self.small.tracker
        pages = PagesStandIn(asked.pages)
        with self._running():
            start = tracker.live
            head = self._head()
            copied = tracker.live - start
            tracker.start_peak()
            with self._weights_as_after_an_update():
                before = tracker.live - copied  # with what was prepared, which stays
                renewal = tracker.peak.bytes - before
                seen = self._history(asked)
                tracker.start_peak()
                small.forward(asked.reads * asked.prompt, fusedgrpo_pages=pages)
                prefill = tracker.peak.bytes - before
                pages.splits = asked.splits
                tracker.start_peak()
                states = small.forward(asked.rows, fusedgrpo_pages=pages).last_hidden_state[0]
                _choose(head, states.to(head.weight.dtype), seen, asked.params)
                decoding = tracker.peak.bytes - before
        entries = pages.bytes
        return DecoderMemory(
            entries=entries,
            renewal=renewal + self._dequantised,
            prefill=prefill - entries,
            decoding=decoding - entries,
            recorded=decoding - entries - copied,
        )

    def _weights_as_after_an_update(self) -> contextlib.AbstractContextManager[None]:
        if self.weights is None:
            return contextlib.nullcontext()
        self.weights.changed()
        return self.weights.active()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """In one context of autocast, as there: its 16-bit copies of float32 weights stay."""
        small = self.small
        small.model.eval()
        with (
            called_by_us(small.model),
            small.fake,
            small.tracker,
            torch.no_grad(),
            small.autocast(),
        ):
            yield

    def _head(self) -> Head:
        """As ``NextToken`` takes it, once for a rollout."""
        head = find_head(self.small.causal_lm)
        return head._replace(weight=head.weight.detach().to(self.small.dtype))

    def _history(self, asked: Decoding) -> Tensor | None:
        """The tokens of all rows so far, where they are looked at."""
        if not asked.params.reads_history:
            return None
        longest = asked.prompt + asked.params.max_new_tokens
        return torch.zeros(asked.rows + 1, longest, dtype=torch.int64)


def _choose(head: Head, states: Tensor, history: Tensor | None, params: SamplingParams) -> None:
    """As ``NextToken`` does on a GPU, from ``states [M, H]``."""
    M, (V, H) = len(states), head.weight.shape
    if not params.filters:
        tiles = tiling(H, V, head.weight.itemsize, "cuda")
        states.new_empty((min(M, tiles.rows), min(tiles.columns, V)), dtype=torch.float32)
        return
    places = torch.zeros(M, dtype=torch.int64)
    seen = places.new_empty(M, 0) if history is None else history.index_select(0, places)
    scores = logits(head, states)
    if params.structured_outputs is not None:
        bits = torch.zeros((M, -(-V // 8)), dtype=torch.uint8, device=states.device)
        scores = only_allowed(scores, bits)
    scores = warpers(params)(seen, scores)
    # A first chunk and tile of ``sample_logits``; the others are as large or smaller.
    R = min(M, ROWS)
    z = scores[:R, : max(LAUNCHED // R, COLUMNS)].clone()
    running = best.RunningBest.start(R, scores, scores.dtype)
    noise = Noise(places[:R], places[:R], V)
    best.sample_tile(z, None, 0, best.AS_THEY_ARE, noise, running)
