"""The logit from the GEMM's result, for the Triton kernels that read a tile."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from fusedgrpo.kernels.logprob.tiles import HeadOptions
from fusedgrpo.kernels.triton_math import tanh


@triton.jit
def read_logits(
    z_row,
    bias_ptr,
    columns,
    inside,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """The logits of ``columns`` of a row, and the softcap's slope there (1 without one)."""
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(z_row + columns, mask=inside, other=0.0) + bias
    if SOFTCAP == 0.0:
        z, slope = x * (LOGIT_SCALE / TEMPERATURE), 1.0
    else:
        capped = tanh(x * (LOGIT_SCALE / SOFTCAP))
        z, slope = capped * (SOFTCAP / TEMPERATURE), 1.0 - capped * capped
    return z, slope


@triton.jit
def base_of(high):
    """The maximum, which is subtracted before exp; 0 where no other column was seen yet."""
    return tl.where(high == float("-inf"), 0.0, high)


def head_constants(head: HeadOptions) -> dict[str, Any]:
    """``read_logits``' constants."""
    return {
        "LOGIT_SCALE": head.logit_scale,
        "SOFTCAP": head.softcap or 0.0,
        "TEMPERATURE": head.temperature,
    }
