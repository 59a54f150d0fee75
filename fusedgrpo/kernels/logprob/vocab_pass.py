"""One pass of hidden states over the vocabulary: GEMM, tile, GEMM, tile after tile.

    z = h @ W_tile.T                      float32
    online softmax of z                   tiles.py, tiles_triton.py
    acc = acc * rescale + p @ W_tile      float32, where gradients are wanted

The GEMMs are the library's (cuBLAS, MKL). Shapes: R rows of a chunk, K columns of a tile, H hidden,
V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Resolved
from fusedgrpo.kernels.launch import Tiling, tiling
from fusedgrpo.kernels.logprob import tiles
from fusedgrpo.kernels.logprob.tiles import HeadOptions, OnlineSoftmax, RowStatistics

# What probabilities are rounded to besides the GEMM's own operand dtype; see probabilities_as.
_rounding: torch.dtype | None = None


class Stored(NamedTuple):
    """Probabilities of R rows that were kept, tile by tile, as ``tiles.softmax_tile`` left them."""

    p: Tensor  # [R, V]
    high: Tensor  # [tiles, R] the maximum when the tile was written
    tile_columns: int


class VocabPass(NamedTuple):
    """R rows after one pass."""

    statistics: RowStatistics
    softmax: OnlineSoftmax
    stored: Stored | None


class LogitTile(NamedTuple):
    """Columns ``lo .. lo + K`` of the vocabulary. ``z`` is used again by the next tile."""

    lo: int
    w: Tensor  # [K, H] their rows of the head, as an operand of a GEMM
    bias: Tensor | None  # [K]
    z: Tensor  # [R, K] what the GEMM left, before bias and scale


def tile_functions(backend: Resolved) -> ModuleType:
    """The functions of ``tiles.py`` in one of their two implementations."""
    if backend == "torch":
        return tiles
    from fusedgrpo.kernels.logprob import tiles_triton

    return tiles_triton


def tiling_for(weight: Tensor) -> Tiling:
    V, H = weight.shape
    return tiling(H, V, operand_dtype(weight).itemsize, weight.device.type)


def logit_tiles(h: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[LogitTile]:
    """The tiles of ``h [R, H] @ weight.T``, one after the other in one buffer."""
    h, V = operand(h), len(weight)
    K = min(tiling_for(weight).columns, V)
    z_RK = torch.empty(len(h), K, dtype=accumulator(h), device=h.device)
    for lo in range(0, V, K):
        w = operand(weight[lo : lo + K])
        z = z_RK[:, : len(w)]
        _product_into(z, h, w)
        yield LogitTile(lo, w, None if bias is None else bias[lo : lo + K], z)


def vocab_pass(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    head: HeadOptions,
    backend: Resolved,
    *,
    want_entropy: bool = False,
    dlogp: Tensor | None = None,
    dentropy: Tensor | None = None,
    store: bool = False,
) -> VocabPass:
    """The online softmax over the columns that are not the target, for the rows of ``h [R, H]``.

    ``dlogp [R, H]`` and ``dentropy [R, H]`` get the gradients of log-prob and entropy if given
    (``dentropy`` needs ``dlogp``), each for one GEMM more. ``store`` keeps the probabilities.
    """
    fn = tile_functions(backend)
    R, V = len(h), len(weight)
    K = min(tiling_for(weight).columns, V)
    dtype, p_dtype = accumulator(h), operand_dtype(weight)
    softmax = OnlineSoftmax.start(R, h, dtype)
    p_RK = torch.empty(R, K, dtype=p_dtype, device=h.device) if dlogp is not None else None
    acc = torch.empty(h.shape, dtype=dtype, device=h.device) if dlogp is not None else None
    acc_first = torch.empty_like(acc) if acc is not None and dentropy is not None else None
    stored = None
    if store:
        highs = torch.empty(-(-V // K), R, dtype=dtype, device=h.device)
        stored = Stored(torch.empty(R, V, dtype=p_dtype, device=h.device), highs, K)

    for index, (lo, w, b, z) in enumerate(logit_tiles(h, weight, bias)):
        p = None
        if stored is not None:
            p = stored.p[:, lo : lo + K]
        elif p_RK is not None:
            p = p_RK[:, : len(w)]
        fn.softmax_tile(
            z, b, target, lo, head, softmax, p, want_first=want_entropy or dentropy is not None
        )
        if p is not None:
            round_operand(p)
        if stored is not None:
            stored.high[index] = softmax.high
        if acc is not None:
            assert p is not None
            if lo > 0:
                fn.rescale(acc, acc_first, softmax.shift)
            mm_into(acc, p, w, add=lo > 0)
            if acc_first is not None:
                fn.moment_tile(z, b, target, lo, head, softmax, p)
                round_operand(p)
                mm_into(acc_first, p, w, add=lo > 0)
    statistics = fn.finish(
        softmax, target, weight, head, acc, acc_first, dlogp, dentropy, want_entropy=want_entropy
    )
    return VocabPass(statistics, softmax, stored)


def accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``x`` enters a GEMM: its own on a GPU, the accumulator's on the CPU, where
    a low-precision GEMM would round its result."""
    return x.dtype if x.device.type == "cuda" else accumulator(x)


def operand(x: Tensor) -> Tensor:
    return x.to(operand_dtype(x))


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, alpha: float = 1.0) -> None:
    """``out (+)= alpha a @ b``, operands of one dtype, accumulated and kept in ``out``'s dtype."""
    low: Any = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, alpha=alpha, out=out, **low)
    else:
        torch.mm(a, b, out=out, **low)


def _product_into(z: Tensor, h: Tensor, w: Tensor) -> None:
    """``z [R, K] = h @ w.T``. With 2 to 6 rows on a CPU as the transposed product, for which MKL
    takes half the time (docs/measured.md)."""
    if h.device.type == "cpu" and 2 <= len(h) <= 6:
        z.copy_(torch.mm(w, h.T).T)
    else:
        mm_into(z, h, w.T)


def as_operand(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` rounded to what an operand of the GEMMs with ``weight`` holds, in its own dtype."""
    return x.to(_rounding or operand_dtype(weight)).to(x.dtype)


@contextlib.contextmanager
def probabilities_as(dtype: torch.dtype) -> Iterator[None]:
    """Rounds probabilities to ``dtype`` before they enter a GEMM, as a GPU does with the operands
    of its GEMMs: to see the GPU's arithmetic on the CPU, in tests and benches."""
    global _rounding
    before, _rounding = _rounding, dtype
    try:
        yield
    finally:
        _rounding = before


def round_operand(p: Tensor) -> None:
    """Rounds an operand that is already in the GEMM's dtype, under ``probabilities_as`` only."""
    if _rounding is not None:
        p.copy_(p.to(_rounding))
