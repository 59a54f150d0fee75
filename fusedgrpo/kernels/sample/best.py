"""The best token so far, tile after tile of the vocabulary, and the softmax of all others.

Every token is scored, and two softmaxes are computed. ``best_cpu.py`` has ``sample_tile`` with the
same arguments and results for a CPU, where both are most of the work, and ``best_triton.py`` for
GPUs. Shapes: R rows of a chunk, K columns of a tile that starts at column ``lo`` of the vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.logprob.tiles import HeadOptions, OnlineSoftmax, softmax_tile, to_logits
from fusedgrpo.kernels.sample.noise import Noise

AS_THEY_ARE = HeadOptions()


class RunningBest(NamedTuple):
    """The best of R rows over the columns so far; tensors are ``[R]`` and change in place.

    The log-prob of a token comes from the softmax of the others (``logprob/op.py``), and which
    token that will be shows late. So there are two: when another token becomes the best, ``every``
    is what ``others`` would be had that token been known from the start, to the last bit.
    """

    score: Tensor  # its logit and noise, -inf before the first finite one
    token: Tensor  # int64, 0 before the first
    column: Tensor  # int64, the same where it is in the last tile, else -1
    nowhere: Tensor  # int64, -1 everywhere
    others: OnlineSoftmax  # over all columns but the best's
    every: OnlineSoftmax  # over all columns

    @classmethod
    def start(cls, R: int, like: Tensor, dtype: torch.dtype) -> RunningBest:
        others, every = (OnlineSoftmax.start(R, like, dtype) for _ in range(2))
        others.z_target.fill_(-torch.inf)
        token = torch.zeros(R, dtype=torch.int64, device=like.device)
        nowhere = torch.full_like(token, -1)
        return cls(others.z_target.clone(), token, nowhere.clone(), nowhere, others, every)


def sample_tile(
    z: Tensor,
    bias: Tensor | None,
    lo: int,
    head: HeadOptions,
    noise: Noise | None,
    best: RunningBest,
) -> None:
    """Takes a tile ``z [R, K]``, as the GEMM left it, into ``best``; uses it up."""
    to_logits(z, bias, head)
    score = z
    if noise is not None:
        score = noise.gumbel(lo, z.shape[1], z.dtype).add_(z)
    high, column = score.masked_fill(score.isnan(), -torch.inf).max(1)
    won = high > best.score  # not >=: of equal scores the lowest id is the best
    best.column.copy_(torch.where(won, column + lo, -1))
    best.token.copy_(torch.where(won, best.column, best.token))
    best.score.copy_(torch.where(won, high, best.score))
    best.others.high.copy_(torch.where(won, best.every.high, best.others.high))
    best.others.total.copy_(torch.where(won, best.every.total, best.others.total))
    for target, softmax, logits in (
        (best.nowhere, best.every, z.clone()),
        (best.column, best.others, z),
    ):
        softmax_tile(logits, None, target, lo, AS_THEY_ARE, softmax, None, want_first=False)
