"""The backward of ``linear_logprob``: a row scale, and a second pass for a head that trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import resolve_backend
from fusedgrpo.kernels.custom_op import plain_arithmetic_on, refuse_second_derivative
from fusedgrpo.kernels.logprob.tiles import HeadOptions, RowStatistics
from fusedgrpo.kernels.logprob.vocab_pass import (
    accumulator,
    mm_into,
    operand,
    operand_dtype,
    round_operand,
    tile_functions,
    tiling_for,
)


@torch.library.custom_op("fusedgrpo::scale_rows", mutates_args=())
def scale_rows(
    grad_logp: Tensor | None, dlogp: Tensor, grad_entropy: Tensor | None, dentropy: Tensor
) -> Tensor:
    """``grad_logp[:, None] * dlogp + grad_entropy[:, None] * dentropy`` over the terms that are
    there, rounded once."""
    out = torch.empty_like(dlogp)
    for lo in range(0, len(dlogp), 4096):
        part = slice(lo, lo + 4096)
        total: Tensor | float = 0.0
        if grad_logp is not None:
            total = total + grad_logp[part, None] * dlogp[part]
        if grad_entropy is not None:
            total = total + grad_entropy[part, None] * dentropy[part]
        out[part] = total
    return out


@scale_rows.register_fake
def _(
    grad_logp: Tensor | None, dlogp: Tensor, grad_entropy: Tensor | None, dentropy: Tensor
) -> Tensor:
    return torch.empty_like(dlogp)


@torch.library.custom_op("fusedgrpo::linear_logprob_head_gradients", mutates_args=())
def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    logp: Tensor,
    z_target: Tensor,
    entropy: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    weight_grad: bool,
    bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients ``[V, H]`` and ``[V]`` of the head: each tile of logits again, ``dz.T @ h``."""
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    fn = tile_functions(resolve_backend(backend, "linear_logprob", hidden.device, hidden.dtype))
    sizes = tiling_for(weight)
    R, K = sizes.rows, min(sizes.head_columns, len(weight))
    keep = None if mask is None else mask.nonzero().flatten()
    N = len(hidden) if keep is None else len(keep)
    target = target.contiguous()
    bias = None if bias is None else bias.contiguous()
    if grad_logp is None:
        grad_logp = torch.zeros_like(logp)
    # Divide by max |grad| before the 16-bit cast: gradients of 1e-8 a token would underflow.
    unit = _greatest(grad_logp, grad_entropy)
    new: dict[str, Any] = {"dtype": accumulator(hidden), "device": hidden.device}
    grad_weight, grad_bias = _head_outputs(weight, bias, weight_grad, bias_grad)
    z_RK = torch.empty(min(R, N), K, **new)
    dz_RK = torch.empty(min(R, N), K, dtype=operand_dtype(weight), device=hidden.device)
    with plain_arithmetic_on(hidden):
        for lo in range(0, len(weight), K):
            w = operand(weight[lo : lo + K])
            b = None if bias is None else bias[lo : lo + K]
            tile_weight, tile_bias = torch.zeros(w.shape, **new), torch.zeros(len(w), **new)
            for r in range(0, N, R):
                rows = slice(r, min(r + R, N)) if keep is None else keep[r : r + R]
                h = operand(hidden[rows])
                z, dz = z_RK[: len(h), : len(w)], dz_RK[: len(h), : len(w)]
                mm_into(z, h, w.T)
                statistics = RowStatistics(
                    logp[rows],
                    z_target[rows],
                    entropy[rows] if len(entropy) else entropy,
                    unit=logp.new_empty(0),  # of dlogp and dentropy, which this pass does not have
                )
                fn.logit_gradient_tile(
                    z,
                    b,
                    target[rows],
                    lo,
                    head,
                    statistics,
                    grad_logp[rows] / unit,
                    None if grad_entropy is None else grad_entropy[rows] / unit,
                    dz,
                )
                round_operand(dz)
                if weight_grad:
                    mm_into(tile_weight, dz.T, h, add=True)
                if bias_grad:
                    tile_bias += dz.sum(0, dtype=tile_bias.dtype)
            if weight_grad:
                grad_weight[lo : lo + K] = tile_weight.mul_(unit)
            if bias_grad:
                grad_bias[lo : lo + K] = tile_bias.mul_(unit)
    return grad_weight, grad_bias


def _greatest(*grads: Tensor | None) -> Tensor:
    """The greatest absolute value of all, 0-dim; 1 where there is none but 0."""
    extremes = [torch.cat([g.abs(), g.new_zeros(1)]).amax() for g in grads if g is not None]
    unit = torch.stack(extremes).amax()
    return torch.where(unit > 0, unit, 1.0)


@head_gradients.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, weight_grad, bias_grad, _ = rest
    return _head_outputs(weight, bias, weight_grad, bias_grad)


def _head_outputs(
    weight: Tensor, bias: Tensor | None, weight_grad: bool, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(weight) if weight_grad else weight.new_empty(0),
        torch.empty_like(bias) if bias_grad and bias is not None else weight.new_empty(0),
    )


refuse_second_derivative(scale_rows, "linear_logprob / linear_policy_loss")
refuse_second_derivative(head_gradients, "linear_logprob")
