"""One tile of logits between two GEMMs, in plain torch: the online softmax (Milakov and Gimelshein,
2018, arXiv 1805.02867) and the gradients.

``tiles_triton.py`` has the same functions with the same arguments; these are the CPU's own path.
Shapes: R rows of a chunk, K columns of a tile that starts at column ``lo`` of the vocabulary V,
H hidden. ``z [R, K]`` is what the GEMM left, before bias and scale, and is used up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """Scale, softcap and temperature: from the GEMM's result to the logit of the softmax."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature!r}: expected a finite number > 0.")
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale={self.logit_scale!r}: expected a finite number, not 0.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap!r}: expected None or a number > 0.")

    @property
    def slope(self) -> float:
        """dz / d(hidden @ weight.T), without the softcap's part."""
        return self.logit_scale / self.temperature


class OnlineSoftmax(NamedTuple):
    """The online softmax of R rows over the columns that are not the target; each ``[R]``."""

    high: Tensor  # greatest z so far, -inf before the first column
    total: Tensor  # sum of exp(z - high)
    first: Tensor  # sum of exp(z - high) * (z - high)
    shift: Tensor  # how far the last tile moved high: its former value minus the new one
    z_target: Tensor
    slope_target: Tensor  # d softcap(x) / dx at the target's logit

    @classmethod
    def start(cls, R: int, like: Tensor, dtype: torch.dtype) -> OnlineSoftmax:
        zeros = torch.zeros(6, R, dtype=dtype, device=like.device)
        zeros[0] = -torch.inf
        zeros[5] = 1.0
        return cls(*zeros.unbind())


class RowStatistics(NamedTuple):
    """R rows after the pass over the vocabulary; all in the accumulator's dtype."""

    logp: Tensor  # [R]
    z_target: Tensor  # [R] with it, log p_j = (z_j - z_target) + logp, however large the logits
    entropy: Tensor  # [R]; [0] unless asked for
    unit: Tensor  # [R] (1 - p_target) * slope, which dlogp and dentropy are to be multiplied by


def softmax_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    softmax: OnlineSoftmax,
    p: Tensor | None,
    *,
    want_first: bool,
) -> None:
    """Takes a tile into the online softmax, and leaves ``exp(z - high) * slope`` in ``p [R, K]``.

    The target's column is 0 in ``p`` and in no sum. The slope is the softcap's, 1 without one.
    """
    to_logits(z, bias, head)
    here, column = _target_column(target, lo, z.shape[1])
    z_column = z.gather(1, column)
    softmax.z_target.copy_(torch.where(here, z_column, softmax.z_target[:, None])[:, 0])
    slope = None
    if head.softcap is not None:
        slope = _softcap_slope(z, head) if p is not None else None
        at_target = _softcap_slope(z_column, head)
        softmax.slope_target.copy_(
            torch.where(here, at_target, softmax.slope_target[:, None])[:, 0]
        )
    z.scatter_(1, column, torch.where(here, -torch.inf, z_column))

    before = softmax.high.clone()
    torch.maximum(before, z.amax(1), out=softmax.high)
    base = _base(softmax.high)
    softmax.shift.copy_(torch.where(before == -torch.inf, 0.0, before - base))
    rescale = softmax.shift.exp()
    z -= base[:, None]
    if p is not None and p.dtype == z.dtype:
        e = torch.exp(z, out=p)
    else:
        e = torch.exp(z, out=None if want_first or p is not None else z)
    if want_first:
        sum_first = (e * z.masked_fill(z == -torch.inf, 0.0)).sum(1)
        softmax.first.copy_(rescale * (softmax.first + softmax.shift * softmax.total) + sum_first)
    softmax.total.mul_(rescale).add_(e.sum(1))
    if p is not None:
        if slope is not None:
            e *= slope
        if e is not p:
            p.copy_(e)


def moment_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    softmax: OnlineSoftmax,
    p: Tensor,
) -> None:
    """Leaves ``exp(z - high) * (z - high) * slope`` in ``p``; z as ``softmax_tile`` left it."""
    e = z.exp()
    e *= z.masked_fill_(z == -torch.inf, 0.0)
    if head.softcap is not None:
        e *= _softcap_slope(z + _base(softmax.high)[:, None], head)
    p.copy_(e)


def rescale(acc: Tensor, acc_first: Tensor | None, shift: Tensor) -> None:
    """Brings the sums ``exp(z - high) W`` and ``exp(z - high) (z - high) W`` to the new high."""
    if acc_first is not None:
        acc_first.addcmul_(acc, shift[:, None]).mul_(shift.exp()[:, None])
    acc.mul_(shift.exp()[:, None])


def finish(
    softmax: OnlineSoftmax,
    target: Tensor,
    weight: Tensor,
    head: HeadOptions,
    acc: Tensor | None,
    acc_first: Tensor | None,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    *,
    want_entropy: bool,
) -> RowStatistics:
    """Log-probs from the sums of the online softmax; ``dlogp [R, H]`` and ``dentropy [R, H]`` get
    d logp / d hidden and d entropy / d hidden, both divided by ``unit``.

    With x = (log-sum-exp of the others) - z_target:

        logp = -softplus(x)    1 - p_target = -expm1(logp)
        H    = H(p_target, 1 - p_target) + (1 - p_target) H(others)
        d logp / d hidden    = (1 - p_target) (W[target] - E_others[W]) slope
        d entropy / d hidden = -sum_j p_j (log p_j + H) W_j slope, the target's term apart

    1 - p_target is the part that 16 bits cannot hold where a token is all but certain.
    """
    base = _base(softmax.high)
    x = softmax.total.log() + (base - softmax.z_target)
    logp = -_softplus(x)
    some = softmax.total > 0
    rest, p_target = -torch.expm1(logp), logp.exp()  # 1 - p_target, p_target
    total = torch.where(some, softmax.total, 1.0)
    entropy = logp.new_empty(0)
    log_rest = -_softplus(-x)
    if want_entropy or dentropy is not None:
        within = torch.where(some, total.log() - softmax.first / total, 0.0)
        own = torch.where(p_target > 0, p_target * logp, 0.0)
        entropy = torch.where(rest > 0, rest * (within - log_rest), 0.0) - own
    if acc is not None and dlogp is not None:
        target_w = weight[target].to(acc.dtype) * softmax.slope_target[:, None]
        mean_w = acc / total[:, None]
        dlogp.copy_(target_w - mean_w)
        if acc_first is not None and dentropy is not None:
            mixed = (rest > 0) & (p_target > 0)
            share = torch.where(mixed, p_target * (logp + entropy) / rest, 0.0)[:, None]
            # log p_j + H where z_j = high
            level = torch.where(some, log_rest - total.log() + entropy, 0.0)[:, None]
            dentropy.copy_(-(share * target_w + acc_first / total[:, None] + level * mean_w))
    return RowStatistics(logp, softmax.z_target, entropy, rest * head.slope)


def logit_gradient_tile(
    z: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lo: int,
    head: HeadOptions,
    statistics: RowStatistics,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    dz: Tensor,
) -> None:
    """Leaves the gradient of the GEMM's result in ``dz [R, K]``, of G logp + E entropy:

    dz_j = (G ([j = target] - p_j) - E p_j (log p_j + H)) * slope
    """
    to_logits(z, bias, head)
    here, column = _target_column(target, lo, z.shape[1])
    slope = None if head.softcap is None else _softcap_slope(z, head)
    logp, G = statistics.logp[:, None], grad_logp[:, None]
    log_p = z.sub_(statistics.z_target[:, None]).add_(logp)
    log_p.scatter_(1, column, torch.where(here, logp, log_p.gather(1, column)))
    p = log_p.exp()
    grad = -G * p
    grad.scatter_(1, column, torch.where(here, -G * torch.expm1(logp), grad.gather(1, column)))
    if grad_entropy is not None:
        surprise = torch.where(p > 0, log_p + statistics.entropy[:, None], 0.0)
        grad -= grad_entropy[:, None] * p * surprise
    if slope is not None:
        grad *= slope
    dz.copy_(grad.mul_(head.slope))


def stored_gradient_tile(
    p: Tensor,
    rows: Tensor,
    target: Tensor,
    lo: int,
    high: Tensor,
    statistics: RowStatistics,
    factor: Tensor,
    at_target: Tensor,
    dz: Tensor,
) -> None:
    """Gradient of the GEMM's result from stored probabilities, for the rows that have one.

    p: ``[R, K]`` as ``softmax_tile`` left it, when the maximum was ``high [R]``. rows: ``[r]``,
    which of R. target, statistics, factor, at_target: ``[r]``. dz: ``[r, K]``, gets
    ``-factor p_j`` with the whole softmax's p, and ``at_target`` in the target's column.
    """
    scale = -factor * (_base(high)[rows] - statistics.z_target + statistics.logp).exp()
    grad = p[rows].to(scale.dtype).mul_(scale[:, None])
    here, column = _target_column(target, lo, grad.shape[1])
    grad.scatter_(1, column, torch.where(here, at_target[:, None], grad.gather(1, column)))
    dz.copy_(grad)


def to_logits(z: Tensor, bias: Tensor | None, head: HeadOptions) -> None:
    """Bias, scale, softcap and temperature on the GEMM's result, in place."""
    if bias is not None:
        z += bias
    if head.softcap is None:
        z.mul_(head.slope)
    else:
        z.mul_(head.logit_scale / head.softcap).tanh_().mul_(head.softcap / head.temperature)


def _softcap_slope(z: Tensor, head: HeadOptions) -> Tensor:
    """d softcap(x) / dx where the logit is ``z``."""
    assert head.softcap is not None
    return 1 - (z * (head.temperature / head.softcap)).square()


def _base(high: Tensor) -> Tensor:
    """The maximum, which is subtracted before exp; 0 where no other column was seen yet."""
    return torch.where(high == -torch.inf, 0.0, high)


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's default turns linear at 20, too early for float64."""
    return softplus(x, threshold=40)


def _target_column(target: Tensor, lo: int, width: int) -> tuple[Tensor, Tensor]:
    """``[R, 1]`` twice: is the target in ``lo .. lo + width``, and its column there, clamped."""
    column = (target - lo)[:, None]
    return (column >= 0) & (column < width), column.clamp(0, width - 1)
