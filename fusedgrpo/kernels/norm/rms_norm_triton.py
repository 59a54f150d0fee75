"""``rms_norm`` in Triton: one program per row."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import norm_launch


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, x_stride, H, eps,
    OFFSET: tl.constexpr, ROUNDS_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out [rows, H]``, contiguous, of ``x [rows, H]`` with rows ``x_stride`` apart."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    inside = dims < H
    x = tl.load(x_ptr + row * x_stride + dims, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / H + eps)
    if ROUNDS_FIRST:
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32) * weight
    else:
        y = y * (OFFSET + weight)
    tl.store(out_ptr + row * H + dims, y.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, rounds_first: bool, offset: float, out: Tensor
) -> None:
    """Writes ``out``, contiguous, of x's shape."""
    H = x.shape[-1]
    rows = x.reshape(-1, H)  # a view where rows are evenly apart
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    launch = norm_launch(H)
    if len(rows) and H:
        rms_norm_kernel[(len(rows),)](
            rows, weight.contiguous(), out, rows.stride(0), H, eps,
            OFFSET=offset, ROUNDS_FIRST=rounds_first, BLOCK=launch.block, **launch.options(),
        )  # fmt: skip
