"""Log-probabilities of given tokens straight from hidden states: the logits never exist.

    z = hidden @ weight.T + bias;  z *= logit_scale;  z = softcap * tanh(z / softcap)
    z /= temperature;              logp = log_softmax(z)[target]

This is attention with query = hidden and key = value = weight. The vocabulary passes by in tiles
under an online softmax, and with each tile ``acc += p @ W_tile`` is kept as well, so that after one
pass ``u = d logp / d hidden`` is known: the backward with a frozen head is one row scale. The work
is 2 u with a frozen head (1 u = 2 N H V FLOP), 1 u when no gradient is needed, 4 u with a head that
trains.

The target's own column stays out of the softmax over the others:

    logp = -softplus(lse_others - z_target)
    u    = (1 - p_target) * (W[target] - E_others[W]),   1 - p_target = -expm1(logp)

so a token that the model is sure of (p -> 1) keeps its gradient instead of losing it to 1 - 1.
Logits and every accumulator are float32. Deterministic: tiles depend on the shape of the head only.

Shapes: N scored tokens, H hidden, V vocabulary, R rows of a chunk, K columns of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.vocab_pass import (
    HeadOptions,
    mm,
    operand,
    target_column,
    tile_shape,
    vocab_pass,
)


class LogProbs(NamedTuple):
    """``logp`` and, if asked for, ``entropy`` in nats; float32, of the targets' shape."""

    logp: Tensor
    entropy: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool | Literal["detached"] = False,
    backend: Backend = "auto",
) -> LogProbs:
    """``log_softmax(logits)[targets]`` without the logits; formula in the module's docstring.

    hidden: ``[..., H]`` float32, bfloat16 or float16 (float64 for checks). weight: ``[V, H]`` of
    the same dtype, any strides; under autocast both are cast to its dtype. targets: ``[...]``
    int64. bias: ``[V]``. mask: ``[...]`` bool; where False nothing is computed, and output and
    gradient are exactly 0. ``return_entropy=True`` gives a differentiable entropy, at the price of
    one more GEMM when hidden needs a gradient; ``"detached"`` gives its value only.

    Returns float32 (float64 for float64 inputs) of the shape of ``targets``. Gradients flow to
    hidden, weight and bias; a second derivative is refused.
    Raises IndexError for a target outside the vocabulary, ValueError or TypeError for shapes,
    dtypes and options that do not fit.
    """
    resolve_backend(backend, "linear_logprob", hidden.device)
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    _check(hidden, weight, targets, bias, mask)

    shape = targets.shape
    hidden_NH, target_N = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    keep = None
    if mask is not None:
        keep = mask.reshape(-1).nonzero().flatten()
        hidden_NH, target_N = hidden_NH.index_select(0, keep), target_N[keep]
    _check_targets(target_N, weight.shape[0])

    want_entropy = return_entropy is not False
    logp, entropy = _LinearLogProb.apply(
        hidden_NH, weight, bias, target_N, head, want_entropy, return_entropy is True
    )
    if keep is not None:
        logp, entropy = (
            None if x is None else x.new_zeros(shape.numel()).index_copy(0, keep, x)
            for x in (logp, entropy)
        )
    return LogProbs(logp.view(shape), None if entropy is None else entropy.view(shape))


class _LinearLogProb(torch.autograd.Function):
    """Row chunks around ``_one_pass``; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: HeadOptions,
        want_entropy: bool,
        grad_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_grad, weight_grad = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        bias_grad = bias is not None and ctx.needs_input_grad[2]
        R, _ = tile_shape(hidden.device.type)
        parts = []
        with torch.autocast(hidden.device.type, enabled=False):
            for lo in range(0, max(len(hidden), 1), R):
                part = vocab_pass(
                    hidden[lo : lo + R],
                    weight,
                    bias,
                    target[lo : lo + R],
                    head,
                    want_entropy=want_entropy,
                    want_u=hidden_grad,
                    want_v=hidden_grad and grad_entropy,
                )
                u, v = (None if x is None else x.to(hidden.dtype) for x in (part.u, part.v))
                parts.append(part._replace(u=u, v=v))
        logp, lse, entropy, u, v = map(_joined, zip(*parts, strict=True))
        assert logp is not None
        if not want_entropy:
            entropy = None
        head_grad = weight_grad or bias_grad
        ctx.head, ctx.grad_entropy = head, grad_entropy
        ctx.weight_grad, ctx.bias_grad = weight_grad, bias_grad
        ctx.save_for_backward(
            u, v, *((hidden, weight, bias, target, logp, lse, entropy) if head_grad else ())
        )
        ctx.set_materialize_grads(False)
        if entropy is not None and not grad_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Any, ...]:
        u, v, *for_head = ctx.saved_tensors
        if not ctx.grad_entropy:
            grad_entropy = None
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(_device_type(grad_logp, grad_entropy), enabled=False):
            if ctx.needs_input_grad[0]:
                grad_hidden = _row_scaled((grad_logp, u), (grad_entropy, v))
            if for_head and (grad_logp is not None or grad_entropy is not None):
                grad_weight, grad_bias = _head_gradients(
                    ctx, *for_head, grad_logp=grad_logp, grad_entropy=grad_entropy
                )
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _device_type(*grads: Tensor | None) -> str:
    return next((g.device.type for g in grads if g is not None), "cpu")


def _row_scaled(*terms: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Sum of ``grad[:, None] * u`` over the terms that are there, rounded once to u's dtype."""
    total: Tensor | None = None
    dtype = None
    for grad, u in terms:
        if grad is None or u is None:
            continue
        dtype = u.dtype
        term = grad[:, None] * u
        total = term if total is None else total + term
    return None if total is None else total.to(dtype)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The chunks end to end, or None where they have nothing."""
    kept = [part for part in parts if part is not None]
    return torch.cat(kept) if kept else None


def _head_gradients(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor | None,
    *,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients ``[V, H]`` and ``[V]`` of the head: each tile of logits again, then ``dz.T @ h``.

    With gradients G of logp and E of entropy,
    dz_j = G ([j = target] - p_j) - E p_j (log p_j + H).
    """
    head: HeadOptions = ctx.head
    R, K = tile_shape(hidden.device.type)
    grad_weight = weight.new_zeros(weight.shape) if ctx.weight_grad else None
    grad_bias = torch.zeros_like(bias) if bias is not None and ctx.bias_grad else None
    for lo in range(0, len(weight), K):
        cols = slice(lo, lo + K)
        w = operand(weight[cols])
        tile_weight = logp.new_zeros(w.shape)
        tile_bias = logp.new_zeros(len(w))
        for r in range(0, len(hidden), R):
            rows = slice(r, r + R)
            h = operand(hidden[rows])
            z = head.logits(h, w, None if bias is None else bias[cols])
            slope = head.softcap_slope(z)
            here, column = target_column(target[rows], lo, len(w))
            log_p = z.sub_(lse[rows, None])
            log_p.scatter_(1, column, torch.where(here, logp[rows, None], log_p.gather(1, column)))
            p = log_p.exp()
            dz = torch.zeros_like(p)
            if grad_logp is not None:
                rest = torch.where(here, -torch.expm1(logp[rows, None]), -p.gather(1, column))
                dz += grad_logp[rows, None] * (-p).scatter_(1, column, rest)
            if grad_entropy is not None and entropy is not None:
                surprise = torch.where(p > 0, log_p + entropy[rows, None], 0.0)
                dz -= grad_entropy[rows, None] * p * surprise
            if slope is not None:
                dz *= slope
            dz *= head.slope
            if grad_weight is not None:
                tile_weight += mm(dz.T, h)
            tile_bias += dz.sum(0)
        if grad_weight is not None:
            grad_weight[cols] = tile_weight.to(grad_weight.dtype)
        if grad_bias is not None:
            grad_bias[cols] = tile_bias.to(grad_bias.dtype)
    return grad_weight, grad_bias


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, mask: Tensor | None
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: "
            "expected [..., H] and [V, H]."
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)} and dtype {targets.dtype}: "
            f"expected {tuple(hidden.shape[:-1])} and torch.int64."
        )
    if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
        raise TypeError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: expected one floating dtype "
            "(cast one of them, or run under autocast)."
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},).")
    if mask is not None and (mask.shape != targets.shape or mask.dtype != torch.bool):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: "
            f"expected {tuple(targets.shape)} and torch.bool."
        )


def _check_targets(target_N: Tensor, vocab: int) -> None:
    """One comparison for the whole batch: an id outside the vocabulary would read another row."""
    if len(target_N) == 0:
        return
    low, high = torch.stack(target_N.aminmax()).tolist()
    if low < 0 or high >= vocab:
        bad = low if low < 0 else high
        raise IndexError(
            f"target id {bad} is outside the vocabulary of {vocab} (valid: 0 to {vocab - 1}). "
            "Do tokenizer and model belong together?"
        )
