"""Layers that take the memory of a GPU's kernels without being them, on fake tensors.

4-bit layers that dequantise their weight for each product, as bitsandbytes does for more than a few
rows; FlashAttention over keys whose prompts are repeated; the tiles of the head operation.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedgrpo.engine.memory.storage_tracker import BLOCK, StorageTracker
from fusedgrpo.kernels.launch import Tiling
from fusedgrpo.models.kv_cache import PAGE
from fusedgrpo.models.packed_attention import check_known
from fusedgrpo.models.varlen_attention import VarlenTraits

ATTENTION = "fusedgrpo_memory"
# Of an H100. A 4090 has 128, an A100 108.
MULTIPROCESSORS = 132


class Batch(NamedTuple):
    """Tokens of a packed micro-batch: forwarded, as keys (prompts repeated), scored. sequences: of
    queries in its attention."""

    tokens: int
    keys: int
    scored: int
    sequences: int


class Ragged(NamedTuple):
    """The attention of a packed micro-batch: its keys, its sequences, and its kernel."""

    keys: int
    sequences: int
    traits: VarlenTraits


def four_bit_bytes(elements: int, nested: bool) -> int:
    """bitsandbytes: two weights a byte, a scale for each 64; nested, scales of a byte and a float32
    for each 256 of them, with a table of 256 and an offset."""
    scales = -(-elements // 64)
    state = [scales, 4 * -(-scales // 256), BLOCK] if nested else [4 * scales]
    return sum(map(rounded, (-(-elements // 2), *state)))


def rounded(size: int) -> int:
    """As the allocator rounds it."""
    return -(-size // BLOCK) * BLOCK


class FourBitLinear(nn.Linear):
    """A linear layer that takes the memory of ``bitsandbytes.nn.Linear4bit``. in_peft: it is called
    by peft, which clones the result of a 4-bit layer."""

    in_peft = True

    def forward(self, x: Tensor) -> Tensor:
        out = _FourBitProduct.apply(x, self.out_features, self.bias)
        return out.clone() if self.in_peft else out

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """``[out, in]``, as ``four_bit.dense_weight`` has it."""
        like = self.weight.new_empty(0, dtype=dtype)
        return _dequantised(like, (self.out_features, self.in_features))


@contextlib.contextmanager
def called_by_us(model: nn.Module) -> Iterator[None]:
    """Inside, nobody clones what 4-bit layers of ``model`` return."""
    layers = [module for module in model.modules() if isinstance(module, FourBitLinear)]
    for layer in layers:
        layer.in_peft = False
    try:
        yield
    finally:
        for layer in layers:
            layer.in_peft = True


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
        ctx.shape = out_features, x.shape[-1]
        weight = _dequantised(x, ctx.shape)  # there until the product is
        return x.new_empty((*x.shape[:-1], len(weight)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight = _dequantised(grad, ctx.shape)
        return grad.new_empty((*grad.shape[:-1], weight.shape[1])), None, None


def _dequantised(x: Tensor, shape: tuple[int, int]) -> Tensor:
    scales = x.new_empty(-(-math.prod(shape) // 64), dtype=torch.float32)
    scales = scales + 1  # the offset
    return x.new_empty(shape)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fusedgrpo_ragged: Ragged | None = None,
    fusedgrpo_pages: PagesStandIn | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As an attention implementation of transformers. fusedgrpo_ragged: of a packed batch.
    fusedgrpo_pages: of our own decoder."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if fusedgrpo_pages is not None:
        check_known(module, options)
        fusedgrpo_pages.windows.append(sliding_window)
        return fusedgrpo_pages.attend(module, q[0], k[0], v[0])[None], None
    if fusedgrpo_ragged is None:
        if q.shape[1] > 1 and q.shape[2] > k.shape[2]:  # SDPA with a mask repeats the heads
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        return v.new_empty((*q.shape[:-1], v.shape[-1])), None
    return _VarlenAttention.apply(q[0], k[0], v[0], fusedgrpo_ragged)[None], None


def sort_with_scratch(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """``torch.sort`` of rows with the scratch that it takes on a GPU: for two to 127 rows, which
    are sorted as one, pairs of a row and a column as they were and sorted, the sorted numbers, and
    a second place for numbers and pairs (torch's SortStable.cu; for more rows it is less)."""
    pair, number = 8, x.itemsize
    scratch = x.new_empty(x.numel() * (3 * pair + 2 * number), dtype=torch.uint8)
    out = torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)
    del scratch
    return out


class PagesStandIn:
    """``pages`` pages of keys and values in each layer, and attention as our own decoder has it
    (``models/cached_attention.py``, ``kernels/decode/attention_triton.py``).

    splits: the parts that a decode step cuts the keys of a row into; None while prompts are read.
    windows: of each attention that ran.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self.splits: int | None = None
        self.windows: list[int | None] = []
        self._layers: dict[nn.Module, list[Tensor]] = {}

    @property
    def bytes(self) -> int:
        return sum(rounded(x.nbytes) for layer in self._layers.values() for x in layer)

    @property
    def layers(self) -> int:
        """How many layers keep something."""
        return len(self._layers)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``[T, h, d]`` of q ``[T, h, d]``, k and v ``[T, h_kv, d]``."""
        if module not in self._layers:
            shape = (self.pages * PAGE,)
            self._layers[module] = [x.new_empty(shape + x.shape[1:]) for x in (k, v)]
        wide = functools.partial(q.new_empty, dtype=torch.float32)
        if self.splits is None:  # the varlen kernel, over gathered keys
            scratch = [torch.empty_like(k), torch.empty_like(v), wide(q.shape[:2])]
        else:
            parts = (self.splits, *q.shape[:2])
            scratch = [wide((2, *parts)), wide((*parts, v.shape[-1]))]
        out = v.new_empty((*q.shape[:2], v.shape[-1]))
        scratch.clear()
        return out


class _VarlenAttention(torch.autograd.Function):
    """FlashAttention 2 (``mha_varlen_bwd``) over gathered keys, and our ``gather_rows``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ragged: Ragged) -> Tensor:
        ctx.ragged, ctx.shared = ragged, (k.shape[1], v.shape[1])
        k, v = (x.new_empty((ragged.keys, *x.shape[1:])) for x in (k, v))
        if ragged.traits.repeats_heads and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        sums = q.new_empty(q.shape[:2], dtype=torch.float32)
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, sums, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, sums, out = ctx.saved_tensors
        dq = torch.empty_like(q)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        scratch = _query_sums(q, ctx.ragged)
        if q.shape[1] != k.shape[1]:
            scratch += [x.new_empty((x.shape[0], q.shape[1], x.shape[2])) for x in (k, v)]
        scratch.clear()
        del q, k, v, sums, out
        if dk.shape[1] != ctx.shared[0]:  # those of a head's copies
            dk, dv = (
                x.unflatten(1, (heads, -1)).sum(2)
                for x, heads in zip((dk, dv), ctx.shared, strict=True)
            )
        gathered = []
        for x in (dk, dv):
            total = x.new_empty((len(dq), *x.shape[1:]), dtype=torch.float32)
            total.add_(x.float()[: len(dq)])
            gathered.append(total.to(x.dtype))
        return dq, *gathered, None  # type: ignore[return-value]


def _query_sums(q: Tensor, ragged: Ragged) -> list[Tensor]:
    """Where the gradient of the queries is summed, each sequence with room for a block, and what is
    to be taken from each row: in parts for as many programs as a GPU runs of few sequences and
    heads together, if it is to be the same bits each time (flash_api.cpp, ``mha_varlen_bwd``)."""
    heads, parts = q.shape[1], 1
    if ragged.traits.sums_in_parts:
        parts = -(-MULTIPROCESSORS // (ragged.sequences * heads))
    rows = len(q) + 128 * ragged.sequences
    shapes: list[tuple[int, ...]] = [(parts, rows, *q.shape[1:]), (rows, heads)]
    return [q.new_empty(shape, dtype=torch.float32) for shape in shapes]


@functools.cache
def register_attention() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


# --- the head -----------------------------------------------------------------------------------


class HeadStandIn(torch.autograd.Function):
    """``linear_logprob`` with its gather, as it allocates: u and its scratch, then a row scale."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: HeadMemory, batch: Batch) -> Tensor:
        head.tracker.start_peak()
        N, H = batch.scored, states.shape[-1]
        hidden = states.new_empty((N, H))
        u = torch.empty_like(hidden) if head.gradients else hidden.new_empty(0)
        if head.trained:
            ctx.weight = states.new_empty(head.vocab, H)
            ctx.hidden = hidden
        R = min(head.tiles.rows, N)
        scratch = [
            hidden.new_empty((R, head.tiles.columns), dtype=torch.float32),
            hidden.new_empty((R, H)),
        ]
        if head.gradients:
            scratch += [
                hidden.new_empty((R, head.tiles.columns)),
                hidden.new_empty((R, H), dtype=torch.float32),
                hidden.new_empty((R, H)),
            ]
        scratch.clear()
        ctx.u, ctx.head, ctx.tokens = u, head, states.shape[0]
        head.peaks["head_forward"] = head.tracker.peak.bytes
        return states.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        head = ctx.head
        head.tracker.start_peak()
        hidden = torch.empty_like(ctx.u)
        if head.trained:
            weight = torch.empty_like(ctx.weight)
            R, K = min(head.tiles.rows, len(hidden)), head.tiles.head_columns
            tiles = [
                hidden.new_empty((R, K), dtype=torch.float32),
                hidden.new_empty((R, K)),
                hidden.new_empty((K, hidden.shape[1]), dtype=torch.float32),
            ]
            tiles.clear()
            weight = weight.float()
        ctx.u = ctx.weight = ctx.hidden = None
        total = hidden.new_empty((ctx.tokens, hidden.shape[1]), dtype=torch.float32)
        wide = hidden.float()
        del hidden, wide
        total = total.to(head.dtype)
        head.peaks["head_backward"] = head.tracker.peak.bytes
        head.tracker.start_peak()
        return total, None, None


@dataclass
class HeadMemory:
    tracker: StorageTracker
    peaks: dict[str, int]
    tiles: Tiling
    vocab: int
    dtype: torch.dtype
    gradients: bool
    trained: bool
