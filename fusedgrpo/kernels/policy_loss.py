"""The clipped policy-gradient loss with a KL to the reference, on ragged tokens.

For a token t of completion i, with advantage A_i and s = logp - old_logp (or its mean over the
completion, level "sequence"), r = exp(s):

    grpo, bnpo, dr_grpo, dapo, luspo   L = -min(min(r, delta) A, clip(r, 1-eps, 1+eps_high) A)
    cispo                              L = -stop(min(r, eps_high)) A logp
    sapo                               L = -4/T sigmoid(T (r - 1)) A,    T by the sign of A
    vespo                              L = -stop(phi(prod r)) A logp
    then                               L = L * sampler_ratio + beta * k3 [* r],
                                       k3 = exp(d) - d - 1, d = ref_logp - logp

and the sum over tokens is divided by a denominator that the caller knows, so that any split into
micro-batches adds up to the same loss. Formulas and metric names: TRL 1.16's ``GRPOTrainer``.
It differs from TRL in one thing: log-ratios are masked, and clamped to +-20, before ``exp``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.options import CLIPPED_LOSS_TYPES, LossOptions

# exp(20) is 5e8: no sane ratio is near it, and exp of it and its gradient stay finite in float32.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """``loss``: scalar. ``metrics``: scalar tensors on the loss's device, detached."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sampler_ratio: Tensor | None = None,
    entropy: Tensor | None = None,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    num_items: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    max_completion_length: int | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    backend: Backend = "auto",
) -> PolicyLoss:
    """Loss and metrics of B completions laid end to end.

    logp: ``[N]`` float, log-probs of the sampled tokens under the policy; carries the gradient.
    advantages: ``[B]``. cu_seqlens: ``[B+1]`` int; completion i is tokens
        ``cu_seqlens[i]:cu_seqlens[i+1]``.
    old_logp: ``[N]`` at sampling time; ``logp`` itself if left out (ratio exactly 1).
    ref_logp: ``[N]`` under the reference; needed when ``beta`` is not 0.
    mask: ``[N]`` bool, False leaves a token out of numerator, default denominator and metrics.
    sampler_ratio: ``[N]`` weight of each token's loss (importance correction of the sampler); a
        token whose weight is not finite is dropped like a masked one and counted in
        ``sampling/dropped_tokens``.
    entropy: ``[N]``, for the metric only.
    num_items: denominator of dapo, cispo, vespo and bnpo, in tokens (default: the unmasked tokens
        of this call). num_sequences: denominator of grpo, sapo, luspo, and with
        ``max_completion_length`` of dr_grpo (default: B).

    With every token masked the loss is exactly 0, still connected to ``logp``. Metrics are means
    over this call's unmasked tokens (over completions at level "sequence"); ``clip_ratio/low_min``
    and ``high_max`` are the least and greatest mean of a completion.
    Raises ValueError for options, shapes or a missing ``ref_logp`` that do not fit.
    """
    options = LossOptions(
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        delta=delta,
        beta=beta,
        use_bias_correction_kl=use_bias_correction_kl,
        max_completion_length=max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos,
        sapo_temperature_neg=sapo_temperature_neg,
        vespo_k_pos=vespo_k_pos,
        vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg,
        vespo_lambda_neg=vespo_lambda_neg,
    )
    resolve_backend(backend, "policy_loss", logp.device)
    _check_shapes(
        logp,
        advantages,
        cu_seqlens,
        options,
        old_logp=old_logp,
        ref_logp=ref_logp,
        mask=mask,
        sampler_ratio=sampler_ratio,
        entropy=entropy,
    )
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.bool()
    dropped = None
    if sampler_ratio is not None:
        finite = sampler_ratio.isfinite()
        dropped = (mask & ~finite).sum()
        mask = mask & finite
        sampler_ratio = torch.where(mask, sampler_ratio, 1.0)
    ragged = _Ragged(cu_seqlens, mask)
    per_sequence = options.importance_sampling_level == "sequence"
    log_ratio = torch.where(mask, logp - (logp.detach() if old_logp is None else old_logp), 0.0)
    log_weight = ragged.mean(log_ratio)[ragged.sequence] if per_sequence else log_ratio
    ratio = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantage = advantages.to(logp.dtype)[ragged.sequence]
    metrics: dict[str, Tensor] = {}

    if options.loss_type in CLIPPED_LOSS_TYPES:
        capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
        clipped = ratio.clamp(1 - options.epsilon, 1 + options.upper)
        token_loss = -torch.minimum(capped * advantage, clipped * advantage)
        metrics |= _clip_metrics(capped.detach(), advantage, ragged, options, per_sequence)
    elif options.loss_type == "cispo":
        token_loss = -ratio.clamp(max=options.upper).detach() * advantage * logp
        hit = (ratio.detach() > options.upper) & (advantage > 0)
        metrics["cispo_clip_ratio"] = ragged.overall_mean(hit, per_sequence)
    elif options.loss_type == "sapo":
        t = _choose(advantage > 0, options.sapo_temperature_pos, options.sapo_temperature_neg, logp)
        token_loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantage
    else:
        phi = _vespo_weight(log_ratio.detach(), sampler_ratio, advantages, ragged, options)
        token_loss = -phi[ragged.sequence] * advantage * logp
        metrics["vespo/phi_seq_mean"] = phi.mean()

    if sampler_ratio is not None and options.loss_type != "vespo":
        token_loss = token_loss * sampler_ratio
    if options.beta:
        assert ref_logp is not None
        d = torch.where(mask, ref_logp - logp, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = d.exp() - d - 1
        if options.use_bias_correction_kl:
            kl = kl * ratio
        token_loss = token_loss + options.beta * kl
        metrics["kl"] = ragged.overall_mean(kl.detach())

    loss = _normalised(
        torch.where(mask, token_loss, 0.0), ragged, options, num_items, num_sequences
    )
    if entropy is not None:
        metrics["entropy"] = ragged.overall_mean(entropy.detach())
    clamped = log_weight.detach().abs() > MAX_LOG_RATIO
    metrics["log_ratio_clamped"] = ragged.overall_mean(clamped, per_sequence)
    if dropped is not None:
        metrics["sampling/dropped_tokens"] = dropped
    return PolicyLoss(loss, metrics)


class _Ragged:
    """Sums over completions ``[B]`` of tokens ``[N]``, under one mask for every sum and count."""

    def __init__(self, cu_seqlens: Tensor, mask: Tensor):
        lengths = cu_seqlens.to(mask.device).diff()
        self.size = len(lengths)
        self.mask = mask
        rows = torch.arange(self.size, device=mask.device)
        self.sequence = rows.repeat_interleave(lengths, output_size=len(mask))  # [N]
        self.count = mask.new_zeros(self.size, dtype=torch.int64).index_add(
            0, self.sequence, mask.long()
        )  # [B]

    def sum(self, x: Tensor) -> Tensor:
        x = torch.where(self.mask, x, 0.0)
        return x.new_zeros(self.size).index_add(0, self.sequence, x)

    def mean(self, x: Tensor) -> Tensor:
        """``[B]``; 0 for a completion without an unmasked token."""
        return self.sum(x) / self.count.clamp(min=1)

    def overall_mean(self, x: Tensor, per_sequence: bool = False) -> Tensor:
        """Mean of ``x [N]`` over unmasked tokens; over completions where x is constant in each."""
        x = x.float()
        if per_sequence:
            return self.mean(x).sum() / (self.count > 0).sum().clamp(min=1)
        return torch.where(self.mask, x, 0.0).sum() / self.mask.sum().clamp(min=1)


def _clip_metrics(
    ratio: Tensor, advantage: Tensor, ragged: _Ragged, options: LossOptions, per_sequence: bool
) -> dict[str, Tensor]:
    low = (ratio < 1 - options.epsilon) & (advantage < 0)
    high = (ratio > 1 + options.upper) & (advantage > 0)
    some = ragged.count > 0
    return {
        "clip_ratio/low_mean": ragged.overall_mean(low, per_sequence),
        "clip_ratio/low_min": _or_zero(
            torch.where(some, ragged.mean(low.float()), torch.inf), "min"
        ),
        "clip_ratio/high_mean": ragged.overall_mean(high, per_sequence),
        "clip_ratio/high_max": _or_zero(
            torch.where(some, ragged.mean(high.float()), -torch.inf), "max"
        ),
        "clip_ratio/region_mean": ragged.overall_mean(low | high, per_sequence),
    }


def _or_zero(x: Tensor, how: str) -> Tensor:
    """Least or greatest of ``x [B]``; 0 where no completion has an unmasked token."""
    if not len(x):
        return x.new_zeros(())
    extreme = x.amin() if how == "min" else x.amax()
    return torch.where(extreme.isinf(), 0.0, extreme)


def _vespo_weight(
    log_ratio: Tensor,
    sampler_ratio: Tensor | None,
    advantages: Tensor,
    ragged: _Ragged,
    options: LossOptions,
) -> Tensor:
    """``phi [B] = w^k exp(lambda (1 - w))`` of the completion's importance weight w; phi(1) = 1."""
    lowest = math.log(1e-8)
    log_w = ragged.sum(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    if sampler_ratio is not None:
        log_w = log_w + ragged.sum(sampler_ratio.log().clamp(lowest, MAX_LOG_RATIO))
    log_w = log_w.clamp(lowest, MAX_LOG_RATIO)
    gain = advantages >= 0
    k = _choose(gain, options.vespo_k_pos, options.vespo_k_neg, log_w)
    lam = _choose(gain, options.vespo_lambda_pos, options.vespo_lambda_neg, log_w).clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp()


def _choose(where: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """``where ? a : b`` in the dtype of ``like`` (torch.where of two numbers would be float32)."""
    return torch.where(where, like.new_full((), a), like.new_full((), b))


def _normalised(
    token_loss: Tensor,
    ragged: _Ragged,
    options: LossOptions,
    num_items: float | Tensor | None,
    num_sequences: float | Tensor | None,
) -> Tensor:
    """The sum of masked ``token_loss [N]`` over the denominator of its loss type."""
    if num_items is None:
        num_items = ragged.mask.sum()
    if num_sequences is None:
        num_sequences = ragged.size
    items, sequences = (
        torch.as_tensor(n, device=token_loss.device, dtype=token_loss.dtype).clamp(min=1)
        for n in (num_items, num_sequences)
    )
    if options.loss_type in ("grpo", "sapo"):
        return ragged.mean(token_loss).sum() / sequences
    if options.loss_type == "luspo":
        return token_loss.sum() / sequences
    if options.loss_type == "dr_grpo":
        assert options.max_completion_length is not None
        return token_loss.sum() / (sequences * options.max_completion_length)
    return token_loss.sum() / items


def _check_shapes(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    options: LossOptions,
    **per_token: Tensor | None,
) -> None:
    if logp.dim() != 1 or advantages.dim() != 1:
        raise ValueError(
            f"logp and advantages have shapes {tuple(logp.shape)} and {tuple(advantages.shape)}: "
            "expected [N] and [B]."
        )
    if cu_seqlens.shape != (len(advantages) + 1,):
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: expected ({len(advantages) + 1},), "
            "one more than there are advantages."
        )
    if options.beta and per_token["ref_logp"] is None:
        raise ValueError(f"beta={options.beta:g} needs ref_logp.")
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(logp.shape)}."
            )
