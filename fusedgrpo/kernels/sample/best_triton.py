"""The best token of a tile of logits in Triton; the softmax beside it is that of ``logprob``."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fusedgrpo.kernels.launch import sample_launch
from fusedgrpo.kernels.logprob.logit_triton import head_constants, read_logits
from fusedgrpo.kernels.logprob.softmax_triton import softmax_tile
from fusedgrpo.kernels.logprob.tiles import HeadOptions
from fusedgrpo.kernels.sample.best import RunningBest
from fusedgrpo.kernels.sample.noise import Noise
from fusedgrpo.kernels.sample.philox_triton import gumbel, token_bits


@triton.jit(
    do_not_specialize_on_alignment=[
        "seed_ptr",
        "position_ptr",
        "score_ptr",
        "token_ptr",
        "column_ptr",
        "others_high_ptr",
        "others_total_ptr",
        "every_high_ptr",
        "every_total_ptr",
    ]
)
def best_tile_kernel(
    z_ptr,
    z_stride,
    bias_ptr,
    seed_ptr,
    position_ptr,
    score_ptr,
    token_ptr,
    column_ptr,
    others_high_ptr,
    others_total_ptr,
    every_high_ptr,
    every_total_ptr,
    lo,
    width,
    LOGIT_SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    z_row = z_ptr + row * z_stride
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + row)
        position = tl.load(position_ptr + row)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_column = tl.zeros((BLOCK,), tl.int32)
    # Four tokens that share their noise may begin before the tile.
    early = lo % 4
    for start in range(0, width + early, BLOCK):
        cols = start - early + tl.arange(0, BLOCK)
        inside = (cols >= 0) & (cols < width)
        score, _ = read_logits(z_row, bias_ptr, cols, inside, LOGIT_SCALE, SOFTCAP, TEMPERATURE)
        if seed_ptr is not None:
            quads = (lo + start) // 4 + tl.arange(0, BLOCK // 4)
            score += gumbel(token_bits(seed, position, quads))
        better = inside & (score > best)  # False for NaN
        best = tl.where(better, score, best)
        best_column = tl.where(better, cols, best_column)
    score = tl.max(best, 0)
    column = tl.min(tl.where(best == score, best_column, width), 0)  # of equal ones the lowest id

    before = tl.load(score_ptr + row)
    won = score > before
    tl.store(score_ptr + row, tl.where(won, score, before))
    tl.store(column_ptr + row, tl.where(won, lo + column, -1).to(tl.int64))
    tl.store(token_ptr + row, (lo + column).to(tl.int64), mask=won)
    tl.store(others_high_ptr + row, tl.load(every_high_ptr + row), mask=won)
    tl.store(others_total_ptr + row, tl.load(every_total_ptr + row), mask=won)


def sample_tile(
    z: Tensor,
    bias: Tensor | None,
    lo: int,
    head: HeadOptions,
    noise: Noise | None,
    best: RunningBest,
) -> None:
    R, K = z.shape
    launch = sample_launch(K)
    best_tile_kernel[(R,)](
        z,
        z.stride(0),
        bias,
        None if noise is None else noise.seeds,
        None if noise is None else noise.positions,
        best.score,
        best.token,
        best.column,
        best.others.high,
        best.others.total,
        best.every.high,
        best.every.total,
        lo,
        K,
        **head_constants(head),
        BLOCK=launch.block,
        **launch.options(),
    )
    for target, softmax in ((best.nowhere, best.every), (best.column, best.others)):
        softmax_tile(z, bias, target, lo, head, softmax, None, want_first=False)
