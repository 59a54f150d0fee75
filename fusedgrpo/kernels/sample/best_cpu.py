"""``best.py`` for a CPU: the same tokens and log-probs, without a logarithm for each token and
mostly without a second softmax.

**Candidates.** The noise of a token is ``-log(-log(1 - v))`` of a random v, which is at most
``-log(v)``. So a token with the logit z reaches the score t only if ``v <= exp(z - t)``, and only
one that reaches the row's best score so far can win. Random bits are compared with that, and the
few tokens that pass get their score by the same formula as in ``best.py``.

The comparison has to let every winner pass, in floats. With the unit of rounding u = 2**-24:
 - a score is rounded once more than noise and logit: by up to u |t|, however small the noise is;
 - the noise is off by up to 1e-5 (``test_no_number_is_infinite_and_all_are_accurate``);
 - ``exp(z - t)`` is taken as ``exp(z - high)``, which the softmax needs too, times
   ``exp(high - t)``. For a winner z - t is above -23, as no noise is greater. high - t is above -23
   too, since t is some logit and its noise, and below 67, or the second factor is infinite. So both
   exponents are below 90, and off by less than 2e-5, and the exponentials by 1e-6 of themselves;
 - half the bits are compared with half the bound, rounded down and then to a float: 2e-7.
t is lowered by ``MARGIN + RELATIVE_MARGIN * |t|`` = 1e-3 + 8 u |t|, which covers the sum and adds
one candidate in a thousand. (Where logits are so large that u |t| counts, both exponents may be
beyond their limits by 2 u |t|, and off by u times that, which is nothing beside u |t|.) What
overflows or is NaN passes: such tokens are all scored.

**Softmaxes.** The softmax of all columns and the one without the best differ where the best is the
greatest logit so far, or has just been found in this tile. In other rows the exponentials and
their sum are the same, to the bit, and are computed once.

Numbers of a row are numpy's, whose calls take a third of torch's time. Logarithms and exponentials
are torch's, which has other bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedgrpo.kernels.logprob.tiles import HeadOptions, OnlineSoftmax, softmax_tile, to_logits
from fusedgrpo.kernels.sample.best import AS_THEY_ARE, RunningBest
from fusedgrpo.kernels.sample.noise import Noise
from fusedgrpo.kernels.sample.philox import gumbel

MARGIN = 2.0**-10
RELATIVE_MARGIN = 2.0**-21

Array = np.ndarray[Any, np.dtype[Any]]


def sample_tile(
    z: Tensor,
    bias: Tensor | None,
    lo: int,
    head: HeadOptions,
    noise: Noise | None,
    best: RunningBest,
) -> None:
    """As in ``best.py``."""
    to_logits(z, bias, head)
    with np.errstate(all="ignore"):
        top = z.numpy().argmax(1)  # the first NaN, if there is one
        tile_high = _at(z, np.arange(len(z)), top).numpy()
        before = best.every.high.numpy().copy(), best.every.total.numpy().copy()
        base = _raise_high(best.every, tile_high)
        e = (z - base[:, None]).exp_()
        sums = e.sum(1).numpy()
        best.every.total.numpy()[:] += sums

        if noise is None:
            high, column = _greatest(z, tile_high, top)
        else:
            high, column = _best_score(z, e, tile_high, top, base, lo, noise, best.score.numpy())
        won = high > best.score.numpy()  # not >=: of equal scores the lowest id is the best
        best.column.numpy()[:] = np.where(won, column + lo, -1)
        for running, new in (
            (best.token, column + lo),
            (best.score, high),
            (best.others.high, before[0]),
            (best.others.total, before[1]),
        ):
            np.copyto(running.numpy(), new, where=won)
        _take_others(z, lo, won, tile_high, sums, best)


def _at(x: Tensor, rows: Array, columns: Array) -> Tensor:
    return torch.from_numpy(x.numpy()[rows, columns])


def _raise_high(softmax: OnlineSoftmax, tile_high: Array) -> Tensor:
    """Takes the greatest logits of a tile into ``high``, and ``total`` to what it is then relative
    to: the result, ``[R]``. The arithmetic is that of ``softmax_tile``."""
    high, total = softmax.high.numpy(), softmax.total.numpy()
    before = high.copy()
    np.maximum(before, tile_high, out=high)
    base = np.where(high == -np.inf, high.dtype.type(0), high)
    shift = np.where(before == -np.inf, high.dtype.type(0), before - base)
    total *= torch.from_numpy(shift).exp_().numpy()
    return torch.from_numpy(base)


def _greatest(z: Tensor, high: Array, column: Array) -> tuple[Array, Array]:
    """The greatest logit of each row that is a number, given those that may be none."""
    if np.isnan(high).any():
        values = z.masked_fill(z.isnan(), -torch.inf).numpy()
        column = values.argmax(1)
        high = values[np.arange(len(z)), column]
    return high, column


def _best_score(
    z: Tensor,
    e: Tensor,
    tile_high: Array,
    top: Array,
    base: Tensor,
    lo: int,
    noise: Noise,
    reached: Array,
) -> tuple[Array, Array]:
    """Score and column ``[R]`` of each row's best token in ``z [R, K]``, where it is better than
    the score ``reached [R]``; elsewhere a score that is not, and any column.

    tile_high, top: the greatest logit of each row, and its column. e: ``exp(z - base)``, used up.
    """
    K = z.shape[1]
    bits = noise.bits(lo, K)

    def scored(rows: Array, columns: Array) -> Array:
        drawn = torch.from_numpy(bits[rows, columns].astype(np.int64))
        score = gumbel(drawn, z.dtype).add_(_at(z, rows, columns)).numpy()
        score[np.isnan(score)] = -np.inf
        return score

    t = reached
    higher = np.flatnonzero(tile_high > reached)
    if len(higher):  # in a first tile always: two scores save many, of peaked logits or flat ones
        t = reached.copy()
        for columns in (top[higher], bits[higher].argmin(1)):
            t[higher] = np.maximum(t[higher], scored(higher, columns))
    lowered = t - (MARGIN + RELATIVE_MARGIN * np.abs(t)).astype(t.dtype)
    bound = (base - torch.from_numpy(lowered)).exp_().mul_(2.0**31)
    # Where all is -inf so far nothing can win.
    bound.numpy()[t == -np.inf] = 0
    half = torch.from_numpy((bits >> np.uint32(1)).view(np.int32)).to(z.dtype)
    # numpy compares several times as fast as torch, and finds a few among many as well.
    lost = np.greater(half.numpy(), e.mul_(bound[:, None]).numpy())
    found = np.flatnonzero(np.logical_not(lost, out=lost))
    high, column = np.full_like(reached, -np.inf), np.zeros_like(top)
    if len(found):
        rows, columns = np.divmod(found, K)  # in order
        score = scored(rows, columns)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        high[rows[starts]] = np.maximum.reduceat(score, starts)
        ties = np.flatnonzero(score == high[rows])[::-1]  # the last one that is written stays
        column[rows[ties]] = columns[ties]
    return high, column


def _take_others(
    z: Tensor, lo: int, won: Array, tile_high: Array, sums: Array, best: RunningBest
) -> None:
    """Takes a tile into ``best.others``; ``z`` is used up. sums: of the exponentials in
    ``best.every``."""
    others = best.others
    shared = np.maximum(others.high.numpy(), tile_high) == best.every.high.numpy()  # not if NaN
    rows = np.flatnonzero(won | ~shared)
    if len(rows) == len(z):
        softmax_tile(z, None, best.column, lo, AS_THEY_ARE, others, None, want_first=False)
        return
    apart = torch.from_numpy(rows)
    part = OnlineSoftmax(*(x[apart] for x in others)) if len(rows) else None
    _raise_high(others, tile_high)
    others.total.numpy()[:] += sums
    if part is not None:
        target = best.column[apart]
        softmax_tile(z[apart], None, target, lo, AS_THEY_ARE, part, None, want_first=False)
        for whole, new in zip(others, part, strict=True):
            whole.numpy()[rows] = new.numpy()
