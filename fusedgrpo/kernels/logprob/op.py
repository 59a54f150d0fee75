"""Log-probabilities of given tokens straight from hidden states: the logits never exist.

    z = hidden @ weight.T + bias;  z *= logit_scale;  z = softcap * tanh(z / softcap)
    z /= temperature;              logp = log_softmax(z)[target]

This is attention with query = hidden and key = value = weight (FlashAttention, Dao et al., 2022,
arXiv 2205.14135). The vocabulary passes by in tiles under an online softmax, and with each tile
``acc += p @ W_tile`` is kept as well, so that after one pass ``dlogp = d logp / d hidden`` is
known: the backward with a frozen head is one row scale. The work is 2 u with a frozen head
(1 u = 2 N H V FLOP), 1 u when no gradient is needed, 4 u with a head that trains.

The target's own column stays out of the softmax over the others:

    logp  = -softplus(lse_others - z_target)
    dlogp = (1 - p_target) * (W[target] - E_others[W]),   1 - p_target = -expm1(logp)

so a token that the model is sure of (p -> 1) keeps its gradient instead of losing it to 1 - 1.
Logits and every accumulator are float32. Deterministic: tiles depend on the shape of the head only.

The trainer uses this and not ``linear_policy_loss``: LoRA freezes the head, rows whose coefficient
is known to be 0 are left out before the forward pass, and the log-probs of policy, old policy and
reference are then those of one function, bit for bit (``docs/decisions/0005-the-head.md``).

Shapes: N scored tokens, H hidden, V vocabulary, R rows of a chunk, K columns of a tile.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.custom_op import (
    autocast_operands,
    check_operands,
    check_targets,
    plain_arithmetic_on,
)
from fusedgrpo.kernels.logprob.backward import head_gradients, scale_rows
from fusedgrpo.kernels.logprob.tiles import HeadOptions
from fusedgrpo.kernels.logprob.vocab_pass import accumulator, tiling_for, vocab_pass


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
    targets_checked: bool = False,
    backend: Backend = "auto",
) -> LogProbs:
    """``log_softmax(logits)[targets]`` without the logits; formula in the module's docstring.

    hidden: ``[..., H]`` float32, bfloat16 or float16 (float64 for checks). weight: ``[V, H]`` of
    the same dtype, any strides; under autocast both are cast to its dtype. targets: ``[...]``
    int64. bias: ``[V]``. mask: ``[...]`` bool; where False nothing is computed, and output and
    gradient are exactly 0. ``return_entropy=True`` gives a differentiable entropy, at the price of
    one more GEMM when hidden needs a gradient; ``"detached"`` gives its value only.
    targets_checked: the caller knows that they are of the vocabulary. Else they are looked at here,
    for which the host waits for the device.

    Returns float32 (float64 for float64 inputs) of the shape of ``targets``. Gradients flow to
    hidden, weight and bias; a second derivative is refused.
    Raises IndexError for a target outside the vocabulary, ValueError or TypeError for shapes,
    dtypes and options that do not fit.
    """
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    hidden, weight = autocast_operands(hidden, weight)
    check_operands(hidden, weight, targets, bias, mask)
    with_grad = torch.is_grad_enabled() and hidden.requires_grad
    logp, _, entropy, *_ = _linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        None if mask is None else mask.reshape(-1),
        head.temperature,
        head.logit_scale,
        head.softcap,
        return_entropy is not False,
        return_entropy is True,
        with_grad,
        targets_checked,
        backend,
    )
    shape = targets.shape
    return LogProbs(logp.view(shape), None if return_entropy is False else entropy.view(shape))


@torch.library.custom_op("fusedgrpo::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    mask: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_entropy: bool,
    grad_entropy: bool,
    want_dlogp: bool,
    targets_checked: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``logp``, ``z_target``, ``entropy``, ``unit``, each ``[N]``, and the gradients ``[N, H]`` of
    logp and entropy in those units; those that were not asked for have no rows."""
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    chosen = resolve_backend(backend, "linear_logprob", hidden.device, hidden.dtype)
    N = len(hidden)
    keep = None if mask is None else mask.nonzero().flatten()
    kept_target = target.contiguous() if keep is None else target[keep]
    bias = None if bias is None else bias.contiguous()
    if not targets_checked:
        check_targets(kept_target, len(weight))

    outputs = _outputs(hidden, want_entropy, want_dlogp, want_dlogp and grad_entropy, torch.zeros)
    R = tiling_for(weight).rows
    full: dict[str, Any] = {"dtype": hidden.dtype, "device": hidden.device}
    with plain_arithmetic_on(hidden):
        for lo in range(0, N if keep is None else len(keep), R):
            # Chunks are gathered one by one: a compacted copy of hidden never exists.
            rows = slice(lo, lo + R) if keep is None else keep[lo : lo + R]
            chunk = hidden[rows]
            dlogp, dentropy = (
                torch.empty(chunk.shape, **full) if len(x) else None for x in outputs[4:]
            )
            statistics = vocab_pass(
                chunk,
                weight,
                bias,
                kept_target[lo : lo + R],
                head,
                chosen,
                want_entropy=want_entropy,
                dlogp=dlogp,
                dentropy=dentropy,
            ).statistics
            for out, part in zip(outputs, (*statistics, dlogp, dentropy), strict=True):
                if len(out) and part is not None:
                    out[rows] = part
    return outputs


def _outputs(
    hidden: Tensor, want_entropy: bool, want_dlogp: bool, want_dentropy: bool, new: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, H = hidden.shape
    row = {"dtype": accumulator(hidden), "device": hidden.device}
    full = {"dtype": hidden.dtype, "device": hidden.device}
    return (
        new(N, **row),
        new(N, **row),
        new(N if want_entropy else 0, **row),
        new(N, **row),
        new((N if want_dlogp else 0, H), **full),
        new((N if want_dentropy else 0, H), **full),
    )


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, want_entropy, grad_entropy, want_dlogp, _, _ = rest
    return _outputs(hidden, want_entropy, want_dlogp, want_dlogp and grad_entropy, torch.empty)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, mask, *_ = inputs
    logp, z_target, entropy, unit, dlogp, dentropy = output
    _, _, _, _, _, *ctx.head, want_entropy, grad_entropy, ctx.has_dlogp, _, ctx.backend = inputs
    ctx.grad_entropy = want_entropy and grad_entropy
    ctx.weight_grad = ctx.needs_input_grad[1]
    ctx.bias_grad = bias is not None and ctx.needs_input_grad[2]
    head_grad = ctx.weight_grad or ctx.bias_grad
    ctx.save_for_backward(
        unit,
        dlogp,
        dentropy,
        *((hidden, weight, bias, target, mask, logp, z_target, entropy) if head_grad else ()),
    )
    ctx.mark_non_differentiable(
        z_target, unit, dlogp, dentropy, *(() if ctx.grad_entropy else (entropy,))
    )
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any,
    grad_logp: Tensor | None,
    grad_z_target: None,
    grad_entropy: Tensor | None,
    *_: None,
) -> tuple[Tensor | None, ...]:
    unit, dlogp, dentropy, *for_head = ctx.saved_tensors
    grad_hidden = grad_weight = grad_bias = None
    if not ctx.grad_entropy:
        grad_entropy = None
    if grad_logp is not None or grad_entropy is not None:
        if ctx.needs_input_grad[0]:
            if not ctx.has_dlogp:
                raise RuntimeError(
                    "linear_logprob ran without grad mode: it kept no gradient of hidden."
                )
            in_units = (None if g is None else g * unit for g in (grad_logp, grad_entropy))
            grad_hidden = scale_rows(next(in_units), dlogp, next(in_units), dentropy)
        if for_head:
            grad_weight, grad_bias = head_gradients(
                *for_head,
                grad_logp,
                grad_entropy,
                *ctx.head,
                ctx.weight_grad,
                ctx.bias_grad,
                ctx.backend,
            )
    return (
        grad_hidden,
        grad_weight if ctx.weight_grad else None,
        grad_bias if ctx.bias_grad else None,
        *[None] * 10,
    )


_linear_logprob.register_autograd(_backward, setup_context=_save)
