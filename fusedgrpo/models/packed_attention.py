"""Attention over packed segments, as an attention implementation of transformers.

Registered as ``fusedgrpo``. A call that carries a ``Plan`` (``fusedgrpo_plan=``) is a packed
forward: queries of a segment see their prefix and, causally, their own segment, nothing else. Any
other call, generation above all, goes to the implementation that the model had before.

Two routes, both with backward. On CUDA in 16 bit, one varlen kernel (flash-attn if installed, else
torch's) over "prefix + own" keys, causal aligned to the bottom right. Elsewhere SDPA over buckets
of segments of nearly one length: padding there costs attention only, since causality keeps it from
sight, and a softcap, which SDPA does not have, spelled out.

Shapes: T packed tokens, h query heads, d head dimension, n segments of a bucket, q their padded
length, P their prefix.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fusedgrpo.models.packed_batch import Segment
from fusedgrpo.models.sending import send_numbers
from fusedgrpo.models.varlen_attention import varlen_kernel

NAME = "fusedgrpo"

log = logging.getLogger(NAME)

# Segments share a bucket down to this share of its longest; shorter ones than SHORT always do.
FILLED = 0.75
SHORT = 32


@dataclass(frozen=True, slots=True)
class Bucket:
    """``n`` segments padded to ``q`` tokens. rows: ``[n * q]`` int64, their places in T (any place
    where there is none). prefix: start and length of what all of them see first."""

    n: int
    q: int
    rows: Tensor
    prefix: tuple[int, int]


class Plan:
    """Who sees whom in one packed batch; what a route needs of it is made once, when asked for."""

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        self.segments = list(segments)
        self.device = device
        self.windows: list[int | None] = []  # of each attention that ran over this plan
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    @functools.cached_property
    def buckets(self) -> tuple[list[Bucket], Tensor]:
        """The buckets, and for each of the T tokens its row in their outputs laid end to end."""
        buckets: list[Bucket] = []
        place: dict[int, int] = {}
        offset = 0
        for members in _bucketed(self.segments):
            q = max(s.length for s in members)
            rows = []
            for k, s in enumerate(members):
                rows += [s.start + min(i, s.length - 1) for i in range(q)]
                place.update((s.start + i, offset + k * q + i) for i in range(s.length))
            offset += len(rows)
            prefix = members[0].prefix_start, members[0].prefix_length
            buckets.append(Bucket(len(members), q, self._index(rows), prefix))
        return buckets, self._index([place[t] for t in range(len(place))])

    @functools.cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Places in T of "prefix + own" of each segment end to end; ``cu_q`` and ``cu_k``, int32;
        the longest segment without and with its prefix."""
        segments = sorted(self.segments)
        keys: list[int] = []
        cu_q, cu_k = [0], [0]
        for s in segments:
            keys += range(s.prefix_start, s.prefix_start + s.prefix_length)
            keys += range(s.start, s.start + s.length)
            cu_q.append(cu_q[-1] + s.length)
            cu_k.append(len(keys))
        return (
            self._index(keys),
            self._index(cu_q, torch.int32),
            self._index(cu_k, torch.int32),
            max(s.length for s in segments),
            max(s.length + s.prefix_length for s in segments),
        )

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        """See ``packed_attention``."""
        return packed_attention(module, query, key, value, self, **options)

    def mask(self, q: int, prefix: int, window: int | None) -> Tensor:
        """``[q, prefix + q]`` bool: causal aligned to the bottom right, at most ``window`` keys."""
        key = q, prefix, window
        if key not in self._masks:
            seen = torch.ones(q, prefix + q, dtype=torch.bool, device=self.device).tril(prefix)
            if window is not None:
                seen = seen.triu(prefix - window + 1)
            self._masks[key] = seen
        return self._masks[key]

    def _index(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return send_numbers(values, self.device, dtype)


def _bucketed(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments with the same prefix and nearly the same length, together."""
    by_prefix: dict[tuple[int, int], list[Segment]] = {}
    for s in segments:
        by_prefix.setdefault((s.prefix_start, s.prefix_length), []).append(s)
    buckets: list[list[Segment]] = []
    for family in by_prefix.values():
        fresh = True
        for s in sorted(family, key=lambda s: -s.length):
            longest = 0 if fresh else buckets[-1][0].length
            if fresh or (longest > SHORT and s.length < FILLED * longest):
                buckets.append([])
            buckets[-1].append(s)
            fresh = False
    return buckets


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``[1, T, h, d]`` of query ``[1, h, T, d]``, key and value ``[1, h_kv, T, d]``.

    window: how many keys a query sees at most, itself counted. softcap: of the scores.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    plan.windows.append(window)
    # Rotary embeddings may leave queries and keys in float32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
    kernel = None
    if query.is_cuda and not dropout and query.shape[-1] == value.shape[-1]:
        kernel = varlen_kernel(query.device, value.dtype, query.shape[-1], softcap is not None)
    if kernel is not None:
        key_rows, cu_q, cu_k, max_q, max_k = plan.varlen
        k, v = gather_rows(k, key_rows), gather_rows(v, key_rows)
        return kernel(q, k, v, cu_q, cu_k, max_q, max_k, scaling, window, softcap)[None]

    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    buckets, place = plan.buckets
    outputs = [
        _bucket_attention(bucket, q, k, v, plan, scaling, window, softcap, dropout)
        for bucket in buckets
    ]
    return torch.cat(outputs).index_select(0, place)[None]


def _bucket_attention(
    bucket: Bucket,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scaling: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """``[n * q, h, d]`` of ``q, k, v [T, h, d]``."""
    start, P = bucket.prefix

    def padded(x: Tensor) -> Tensor:
        rows = x.index_select(0, bucket.rows)
        return rows.view(bucket.n, bucket.q, *x.shape[1:]).transpose(1, 2)

    def with_prefix(x: Tensor) -> Tensor:
        own = padded(x)
        if not P:
            return own
        prefix = x[start : start + P].transpose(0, 1).expand(bucket.n, -1, -1, -1)
        return torch.cat([prefix, own], dim=2)

    queries, keys, values = padded(q), with_prefix(k), with_prefix(v)
    if window is not None and window >= P + bucket.q:
        window = None
    plain = P == 0 and window is None
    mask = None if plain and softcap is None else plan.mask(bucket.q, P, window)
    if softcap is None:
        out = scaled_dot_product_attention(
            queries, keys, values, mask, dropout, is_causal=plain, scale=scaling
        )
    else:
        assert mask is not None
        scores = torch.tanh(queries @ keys.transpose(2, 3) * (scaling / softcap)) * softcap
        scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(values.dtype)
        out = nn.functional.dropout(weights, dropout) @ values
    return out.transpose(1, 2).flatten(0, 1)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` for rows that may repeat. On a GPU the gradient of a repeated row is summed in
    float32 at least and in a fixed order, where ``index_select`` adds in x's dtype as threads come.
    """
    return _GatherRows.apply(x, rows) if x.is_cuda else x.index_select(0, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        total.index_put_((rows,), grad.to(wide), accumulate=True)  # sorts: no atomics
        return total.to(grad.dtype), None


# --- the implementation as transformers calls it ---------------------------------------------


def install(model: nn.Module) -> dict[int, tuple[Any, str]]:
    """Route the attention of ``model`` (a transformers causal LM) through here.

    Calls without a plan go where they went before. Returns what ``uninstall`` takes to undo it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed: dict[int, tuple[Any, str]] = {}
    for config in configs.values():
        original = getattr(config, "_attn_implementation", None)
        if original is None or original.startswith(NAME):
            continue
        name = NAME if original == "sdpa" else f"{NAME}_{original}"
        AttentionInterface.register(name, functools.partial(_attention_forward, original))
        if original in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        config._attn_implementation_internal = name
        changed[id(config)] = config, original
    return changed


def uninstall(changed: dict[int, tuple[Any, str]]) -> None:
    for config, original in changed.values():
        config._attn_implementation_internal = original


def implementation(model: nn.Module) -> str | None:
    """The attention that ``model`` has in transformers, whether it is routed through here or not:
    ``"sdpa"``, ``"eager"``, ... None where it does not say."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return "sdpa" if name == NAME else name and str(name).removeprefix(f"{NAME}_")


def installed(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return str(getattr(config, "_attn_implementation", "")).startswith(NAME)


# Keyword arguments of an attention that change nothing in what it computes over a plan.
HARMLESS = {
    "is_causal", "position_ids", "cache_position", "past_key_values", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip


def _attention_forward(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fusedgrpo_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if fusedgrpo_plan is None:
        optional = {"sliding_window": sliding_window, "softcap": softcap}
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        with _own_name(module, original):
            return _implementation(original, module)(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                **kwargs,
            )  # fmt: skip
    check_known(module, kwargs)
    out = fusedgrpo_plan.attend(
        module,
        query,
        key,
        value,
        dropout=dropout,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return out, None


def check_known(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raises NotImplementedError for attention that a plan does not do. options: keyword arguments
    of its call."""
    for name, given in options.items():
        if name not in HARMLESS and given is not None and given is not False:
            raise NotImplementedError(f"attention with {name}")
    if not getattr(module, "is_causal", True):
        raise NotImplementedError("attention that is not causal")


@contextlib.contextmanager
def _own_name(module: nn.Module, original: str) -> Iterator[None]:
    """Inside, the module's config names the implementation that really runs: some look there."""
    config: Any = getattr(module, "config", None)
    name = getattr(config, "_attn_implementation", None)
    if name is None:
        yield
        return
    config._attn_implementation_internal = original
    try:
        yield
    finally:
        config._attn_implementation_internal = name


def _implementation(original: str, module: nn.Module) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if original == "eager" and eager is not None:
        return eager
    return ALL_ATTENTION_FUNCTIONS[original]
