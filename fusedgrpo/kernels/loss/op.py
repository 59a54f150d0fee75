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
micro-batches adds up to the same loss. Formulas and metric names: TRL 1.16's ``GRPOTrainer``; each
loss's paper: ``surrogates/``.
It differs from TRL in one thing: log-ratios are masked, and clamped to +-20, before ``exp``.

The forward already writes d loss / d logp (``terms.py``, where the derivation is), so that the
backward is one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.custom_op import plain_arithmetic_on, refuse_second_derivative
from fusedgrpo.kernels.loss.denominator import loss_denominator
from fusedgrpo.kernels.loss.terms import loss_terms_torch
from fusedgrpo.kernels.loss.types import METRICS, LossTerms, PerToken, PolicyLoss, name_metrics
from fusedgrpo.loss_options import LossOptions


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
    The gradient flows to ``logp`` alone, of the dtype of ``logp``; a second derivative is refused.
    Float64 ``logp`` computes in float64 (torch only), anything else in float32.
    Raises ValueError for options, shapes, a missing ``ref_logp`` or ``cu_seqlens`` (looked at only
    on the CPU) that do not fit, and TypeError for float64 with ``backend="triton"``.
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
    per_token = PerToken(old_logp, ref_logp, mask, sampler_ratio, entropy)
    check_ragged(logp, advantages, cu_seqlens, options, backend, per_token)
    if logp.dtype != torch.float64:
        logp = logp.float()
    loss, _, metrics = torch.ops.fusedgrpo.policy_loss(
        logp,
        advantages,
        cu_seqlens,
        loss_denominator(options, logp, len(advantages), per_token, num_items, num_sequences),
        *per_token,
        options.to_numbers(),
        backend,
    )
    named = name_metrics(
        metrics.detach(),
        options,
        entropy=entropy is not None,
        sampler_ratio=sampler_ratio is not None,
    )
    return PolicyLoss(loss, named)


def check_ragged(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    options: LossOptions,
    backend: str,
    per_token: PerToken,
) -> None:
    """ValueError for shapes or a missing ``ref_logp`` that do not fit; TypeError for float64 where
    Triton is asked for."""
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
    if options.beta and per_token.ref_logp is None:
        raise ValueError(f"beta={options.beta:g} needs ref_logp.")
    if backend == "triton" and logp.dtype == torch.float64:
        raise TypeError("backend='triton' computes in float32: logp is float64.")
    for name, tensor in per_token._asdict().items():
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(logp.shape)}."
            )


@torch.no_grad()
def loss_terms(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    options: LossOptions,
    per_token: PerToken,
    *,
    counts: Tensor | None = None,
    backend: str,
) -> LossTerms:
    """Loss, coefficients and metrics of completions, or of fragments of them; not differentiable.

    Tensors as in ``policy_loss``; all arithmetic and results are float64 for float64 ``logp``
    (torch only), else float32.
    denominator: 0-dim, what the sum of the token losses is divided by; for grpo and sapo what the
        sum of the completions' means is divided by.
    counts: ``[B]``, unmasked tokens of each whole completion, for grpo and sapo where a
        completion's tokens are only partly here (default: those that are here).
    backend: "torch" or "triton", as ``resolve_backend`` gave it.

    A token's coefficient does not depend on the other completions. At level "token", vespo aside,
    nor does it on the other tokens of its own: any fragment gives it bit by bit. The means in
    ``metrics`` and the loss are those of the tokens at hand.
    """
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32

    def numeric(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(logp.device, dtype)

    arguments = (
        logp.to(dtype),
        advantages.to(logp.device, dtype),
        cu_seqlens.to(logp.device),
        denominator.to(logp.device, dtype),
        options,
        PerToken(
            old_logp=numeric(per_token.old_logp),
            ref_logp=numeric(per_token.ref_logp) if options.beta else None,
            mask=None if per_token.mask is None else per_token.mask.bool(),
            sampler_ratio=numeric(per_token.sampler_ratio),
            entropy=numeric(per_token.entropy),
        ),
        numeric(counts),
    )
    if backend == "triton":
        from fusedgrpo.kernels.loss.terms_triton import loss_terms_triton

        with plain_arithmetic_on(logp):
            return loss_terms_triton(*arguments)
    return loss_terms_torch(*arguments)


@torch.library.custom_op("fusedgrpo::policy_loss", mutates_args=())
def _policy_loss(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    mask: Tensor | None,
    sampler_ratio: Tensor | None,
    entropy: Tensor | None,
    options: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``LossTerms``; only the loss is differentiable, and only by ``logp``."""
    if cu_seqlens.device.type == "cpu":  # elsewhere the check would wait for the device
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != len(logp) or ends != sorted(ends):
            raise ValueError(f"cu_seqlens is {ends}: expected to rise from 0 to N={len(logp)}.")
    terms = loss_terms(
        logp,
        advantages,
        cu_seqlens,
        denominator,
        LossOptions.from_numbers(options),
        PerToken(old_logp, ref_logp, mask, sampler_ratio, entropy),
        # Here, not in the public function: torch.compile cannot trace the look at the machine.
        backend=resolve_backend(backend, "policy_loss", logp.device, logp.dtype),
    )
    return terms.loss, terms.coefficient, terms.metrics


@_policy_loss.register_fake
def _(logp: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return logp.new_empty(()), torch.empty_like(logp), logp.new_empty(len(METRICS))


@torch.library.custom_op("fusedgrpo::policy_loss_backward", mutates_args=())
def _policy_loss_backward(grad_loss: Tensor, coefficient: Tensor) -> Tensor:
    return grad_loss * coefficient


@_policy_loss_backward.register_fake
def _(grad_loss: Tensor, coefficient: Tensor) -> Tensor:
    return torch.empty_like(coefficient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, coefficient, metrics = output
    ctx.mark_non_differentiable(coefficient, metrics)
    ctx.save_for_backward(coefficient)
    ctx.absent = (None,) * (len(inputs) - 1)


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (coefficient,) = ctx.saved_tensors
    return torch.ops.fusedgrpo.policy_loss_backward(grad_loss, coefficient), *ctx.absent


_policy_loss.register_autograd(_backward, setup_context=_save)
refuse_second_derivative(_policy_loss_backward, "policy_loss")
