"""Attention that keeps keys and values: over whole prompts, and of the last tokens over pages.

Both are plans that our attention finds in a keyword of the call, as in the packed forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fusedgrpo.kernels import decode_attention
from fusedgrpo.kernels.backend import resolve_backend
from fusedgrpo.kernels.custom_op import plain_arithmetic_on
from fusedgrpo.kernels.decode.attention_torch import attend, layout_for
from fusedgrpo.kernels.decode.layout import DecodeLayout
from fusedgrpo.models.kv_cache import PagedCache
from fusedgrpo.models.packed_attention import Plan
from fusedgrpo.models.packed_batch import Segment


class PromptPlan(Plan):
    """Prompts end to end, each of which sees itself, causally, and is kept. slots: ``[T]``."""

    def __init__(self, segments: Sequence[Segment], cache: PagedCache, slots: Tensor):
        super().__init__(segments, slots.device)
        self.cache = cache
        self.slots = slots

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> Tensor:
        k, v = (x[0].transpose(0, 1) for x in (key.to(value.dtype), value))
        self.cache.write(module, k, v, self.slots)
        return super().attend(module, query, key, value, **options)


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """The last token of each of M sequences. slots: ``[M]``, where its key is kept. The rest as in
    ``decode_attention``."""

    cache: PagedCache
    slots: Tensor
    prompt_pages: Tensor
    prompt_lengths: Tensor
    cu_rows: Tensor
    own_pages: Tensor
    own_lengths: Tensor
    # In torch, what tables and lengths say, by window: made in the first layer, used in all.
    _layouts: dict[int | None, DecodeLayout] = field(default_factory=dict, init=False)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """``[1, M, h, d]`` of query ``[1, h, M, d]``, key and value ``[1, h_kv, M, d]``."""
        query, key = query.to(value.dtype), key.to(value.dtype)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        keys, values = self.cache.write(module, k, v, self.slots)
        tables = (
            self.prompt_pages,
            self.prompt_lengths,
            self.cu_rows,
            self.own_pages,
            self.own_lengths,
        )
        backend = resolve_backend("auto", "decode_attention", q.device, q.dtype)
        # The operator refuses a gradient, and would make the layout once more in each layer.
        if backend == "triton" or torch.is_grad_enabled():
            return decode_attention(
                q, keys, values, *tables, scaling=scaling, window=window, softcap=softcap
            )[None]
        if window not in self._layouts:
            self._layouts[window] = layout_for(keys, *tables, window)
        scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
        with plain_arithmetic_on(q):
            return attend(self._layouts[window], q, keys, values, scaling, softcap)[None]
