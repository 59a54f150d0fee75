"""The policy loss and its derivative by every log-prob, in one pass: the math, in plain torch.

For a token t of completion i with advantage A, n unmasked tokens, s = logp - old_logp:

    w = s at level "token", mean_i(s) at level "sequence";   r = exp(clamp(w, -20, 20))
    L = surrogate(r, logp) * sampler_ratio + beta * k3(d) [* r]        (vespo: the ratio is in phi)
    d = clamp(ref_logp - logp, -20, 20),   k3(d) = exp(d) - d - 1
    loss = sum_i sum_t L / D          D = denominator, times n for grpo and sapo

With L' the derivative of L through r, and l' the derivative by logp where it stands on its own,

    surrogate    L' and l' times sampler_ratio (vespo: as they are); each in its file of surrogates/
    KL           L' = 0 [beta k3(d)],   l' = -beta expm1(d) [* r], 0 where d is clamped

the coefficient d loss / d logp_t is

    level "token"       (L'_t r_t [|w_t| <= 20] + l'_t) / D
    level "sequence"    (mean_i(L' r [|w| <= 20]) + l'_t) / D

Papers (arXiv): level "sequence" 2507.18071 (GSPO), the KL times r 2512.02556 (DeepSeek-V3.2); k3:
Schulman, "Approximating KL divergence", joschu.net/blog/kl-approx.html.

``terms_triton.py`` has the same lines as a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedgrpo.kernels.loss.surrogates import SURROGATES
from fusedgrpo.kernels.loss.types import MAX_LOG_RATIO, MIN_LOG_WEIGHT, LossTerms, PerToken
from fusedgrpo.loss_options import LossOptions


def loss_terms_torch(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    options: LossOptions,
    per_token: PerToken,
    counts: Tensor | None,
) -> LossTerms:
    """All tensors on the device and of the dtype of ``logp``, ``mask`` and ``cu_seqlens`` aside."""
    old_logp, ref_logp, mask, sampler_ratio, entropy = per_token
    surrogate = SURROGATES[options.kind.surrogate]
    keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    dropped = logp.new_zeros(())
    if sampler_ratio is not None:
        finite = sampler_ratio.isfinite()
        dropped = (keep & ~finite).sum().to(logp.dtype)
        keep = keep & finite
        sampler_ratio = torch.where(keep, sampler_ratio, 1.0)
    ragged = _Ragged(cu_seqlens, keep, logp.dtype)
    logp = torch.where(keep, logp, 0.0)
    log_ratio = logp - (logp if old_logp is None else torch.where(keep, old_logp, 0.0))
    advantage = ragged.spread(advantages)

    log_weight = ragged.spread(ragged.mean(log_ratio)) if options.per_sequence else log_ratio
    clamped = log_weight.abs() > MAX_LOG_RATIO
    ratio = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    phi = logp.new_zeros(ragged.size)
    if surrogate.completion_weight is not None:
        log_w = _completion_log_weight(log_ratio, sampler_ratio, ragged)
        phi = surrogate.completion_weight(log_w, advantages, options)

    value, by_ratio, by_logp, low, high = surrogate.token_terms(
        ratio, advantage, logp, ragged.spread(phi), options
    )
    if sampler_ratio is not None and surrogate.completion_weight is None:
        value, by_ratio, by_logp = (x * sampler_ratio for x in (value, by_ratio, by_logp))
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        gap = torch.where(keep, ref_logp, 0.0) - logp
        d = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = d.expm1() - d
        kl_by_logp = torch.where(gap.abs() > MAX_LOG_RATIO, 0.0, -d.expm1())
        if options.use_bias_correction_kl:
            by_ratio = by_ratio + options.beta * kl
            kl, kl_by_logp = kl * ratio, kl_by_logp * ratio
        value = value + options.beta * kl
        by_logp = by_logp + options.beta * kl_by_logp

    through_ratio = torch.where(clamped, 0.0, by_ratio * ratio)
    if options.per_sequence:
        through_ratio = ragged.spread(ragged.mean(through_ratio))
    sums = ragged.sum(value)
    share = 1 / denominator
    if options.mean_per_completion:
        counts = (ragged.count if counts is None else counts).clamp(min=1)
        sums = sums / counts
        share = ragged.spread(share / counts)
    coefficient = torch.where(keep, (through_ratio + by_logp) * share, 0.0)
    loss = sums.sum() / denominator

    def mean(x: Tensor) -> Tensor:
        """Over tokens; over completions where x is constant in each."""
        if options.per_sequence:
            return ragged.mean(x).sum() / (ragged.count > 0).sum().clamp(min=1)
        return ragged.token_mean(x)

    low, high = low.to(logp.dtype), high.to(logp.dtype)
    empty = ragged.count == 0
    metrics = [
        mean(low),
        _or_zero(ragged.mean(low).masked_fill(empty, torch.inf), torch.amin),
        mean(high),
        _or_zero(ragged.mean(high).masked_fill(empty, -torch.inf), torch.amax),
        mean(low + high),
        phi.sum() / max(ragged.size, 1),
        ragged.token_mean(kl),
        logp.new_zeros(()) if entropy is None else ragged.token_mean(entropy),
        mean(clamped.to(logp.dtype)),
        dropped,
    ]
    return LossTerms(loss, coefficient, torch.stack(metrics))


class _Ragged:
    """Sums over completions ``[B]`` of kept tokens ``[N]``, in an order that never changes."""

    def __init__(self, cu_seqlens: Tensor, keep: Tensor, dtype: torch.dtype):
        self.cu_seqlens, self.keep = cu_seqlens, keep
        self.size = len(cu_seqlens) - 1
        self.count = self.sum(torch.ones_like(keep, dtype=dtype))  # [B]
        rows = torch.arange(self.size, device=keep.device)
        self.sequence = rows.repeat_interleave(cu_seqlens.diff(), output_size=len(keep))  # [N]

    def spread(self, x: Tensor) -> Tensor:
        """``[B]`` to ``[N]``."""
        return x[self.sequence]

    def sum(self, x: Tensor) -> Tensor:
        # Not index_add, which on a GPU adds atomically, in any order.
        x = torch.where(self.keep, x, 0.0)
        return torch.segment_reduce(x, "sum", offsets=self.cu_seqlens)

    def mean(self, x: Tensor) -> Tensor:
        """``[B]``; 0 for a completion without a kept token."""
        return self.sum(x) / self.count.clamp(min=1)

    def token_mean(self, x: Tensor) -> Tensor:
        return self.sum(x).sum() / self.count.sum().clamp(min=1)


def _completion_log_weight(
    log_ratio: Tensor, sampler_ratio: Tensor | None, ragged: _Ragged
) -> Tensor:
    """``[B]``: the logarithm of the product of a completion's ratios, and of its sampler's."""
    log_w = ragged.sum(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if sampler_ratio is not None:
        log_w = log_w + ragged.sum(sampler_ratio.log().clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO))
    return log_w.clamp(MIN_LOG_WEIGHT, MAX_LOG_RATIO)


def _or_zero(x: Tensor, extreme: Callable[[Tensor], Tensor]) -> Tensor:
    """The least or greatest of ``x [B]``; 0 where no completion has a kept token."""
    if not len(x):
        return x.new_zeros(())
    found = extreme(x)
    return torch.where(found.isinf(), 0.0, found)
