"""Hidden states to policy loss in one operation: the gradients come out of the forward pass.

``linear_logprob`` knows nothing of the loss, so it pays for d logp / d hidden of every token. Here
a chunk of rows keeps its probabilities, the loss gives c = d loss / d logp of the chunk, and the
gradients follow from the same probabilities,

    dz = c * ([j = target] - p_j) * slope      d hidden = dz @ W      d weight = dz.T @ hidden

for the rows whose c is not exactly 0. In units of u = 2 N H V FLOP, with f the share of such rows:
1 + f with a frozen head, 1 + 2 f with a head that trains, and 1 without gradients.

Chunks are cut anywhere, unless the loss needs whole completions (level "sequence", vespo). A
completion that is longer than a chunk is then passed twice, once for its log-probs and once more,
its rows with a gradient only, for those: 1 + 2 f and 1 + 3 f.

For loops that train the head, by ``GRPOLoss`` and ``integrations/liger.py``; the trainer uses
``linear_logprob`` (why: ``docs/decisions/0005-the-head.md``).

Shapes: N tokens, B completions, H hidden, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.custom_op import (
    autocast_operands,
    check_operands,
    check_targets,
    plain_arithmetic_on,
    refuse_second_derivative,
)
from fusedgrpo.kernels.fused_loss.chunks import chunks, used_tokens
from fusedgrpo.kernels.fused_loss.grad_from_probs import HeadGradients, add_gradients
from fusedgrpo.kernels.logprob.backward import scale_rows
from fusedgrpo.kernels.logprob.tiles import HeadOptions
from fusedgrpo.kernels.logprob.vocab_pass import VocabPass, accumulator, tiling_for, vocab_pass
from fusedgrpo.kernels.loss.denominator import loss_denominator
from fusedgrpo.kernels.loss.op import check_ragged, loss_terms
from fusedgrpo.kernels.loss.types import METRICS, PerToken, PolicyLoss, name_metrics
from fusedgrpo.loss_options import LossOptions


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    options: LossOptions,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_ratio: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_items: float | Tensor | None = None,
    num_sequences: float | Tensor | None = None,
    return_entropy: bool = False,
    backend: Backend = "auto",
) -> PolicyLoss:
    """``policy_loss(linear_logprob(hidden, weight, targets), ...)`` without its third GEMM.

    hidden: ``[N, H]``; weight, targets, bias, temperature, logit_scale, softcap as in
    ``linear_logprob``; advantages, cu_seqlens and the rest as in ``policy_loss``, whose loss and
    metrics this returns. ``return_entropy`` adds the metric ``entropy``.

    Gradients flow to hidden, weight and bias; they are computed in the forward pass, for those of
    them that need one. A second derivative is refused.
    Raises IndexError for a target outside the vocabulary, ValueError or TypeError for shapes,
    dtypes and options that do not fit.
    """
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    hidden, weight = autocast_operands(hidden, weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: expected [N, H].")
    check_operands(hidden, weight, targets, bias, mask)
    logp = hidden.new_empty(len(targets), dtype=accumulator(hidden))
    per_token = PerToken(old_logp, ref_logp, mask, sampler_ratio)
    check_ragged(logp, advantages, cu_seqlens, options, backend, per_token)
    with_grad = torch.is_grad_enabled()
    loss, metrics, *_ = _linear_policy_loss(
        hidden,
        weight,
        bias,
        targets,
        advantages,
        cu_seqlens,
        loss_denominator(options, logp, len(advantages), per_token, num_items, num_sequences),
        old_logp,
        ref_logp,
        mask,
        sampler_ratio,
        options.to_numbers(),
        head.temperature,
        head.logit_scale,
        head.softcap,
        return_entropy,
        with_grad and hidden.requires_grad,
        with_grad and weight.requires_grad,
        with_grad and bias is not None and bias.requires_grad,
        backend,
    )
    named = name_metrics(
        metrics.detach(), options, entropy=return_entropy, sampler_ratio=sampler_ratio is not None
    )
    return PolicyLoss(loss, named)


@torch.library.custom_op("fusedgrpo::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    denominator: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    mask: Tensor | None,
    sampler_ratio: Tensor | None,
    options: Sequence[float],
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    want_entropy: bool,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, metrics, and the gradients: of hidden ``[N, H]`` in units ``[N]``, of weight, of bias;
    those that were not asked for are empty."""
    loss_options = LossOptions.from_numbers(options)
    head = HeadOptions(temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    chosen = resolve_backend(backend, "linear_policy_loss", hidden.device, hidden.dtype)
    per_token = PerToken(old_logp, ref_logp, None, sampler_ratio)
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    used, ends = used_tokens(cu_seqlens, mask, sampler_ratio, hidden)
    check_targets(targets[used], len(weight))
    counts = torch.tensor(ends, device=hidden.device).diff()

    N, dtype = len(hidden), accumulator(hidden)
    logp = torch.zeros(N, dtype=dtype, device=hidden.device)
    entropy = torch.zeros_like(logp) if want_entropy else None
    wanted = hidden_grad, weight_grad, bias_grad
    gradients = _gradients(hidden, weight, bias, *wanted, torch.zeros)
    sizes = tiling_for(weight)
    R = sizes.stored_rows if any(wanted) else sizes.rows
    whole = loss_options.needs_whole_completions

    def forward(tokens: Tensor, store: bool) -> VocabPass:
        return vocab_pass(
            hidden[tokens],
            weight,
            bias,
            targets[tokens],
            head,
            chosen,
            want_entropy=want_entropy,
            store=store,
        )

    with plain_arithmetic_on(hidden):
        for chunk in chunks(ends, R, whole and any(wanted)):
            tokens = used[chunk.lo : chunk.hi]
            pieces = tokens.split(R)
            once = len(pieces) == 1
            for piece in pieces:
                passed = forward(piece, store=once and any(wanted))
                logp[piece] = passed.statistics.logp
                if entropy is not None:
                    entropy[piece] = passed.statistics.entropy
            if not any(wanted):
                continue
            own = slice(chunk.first, chunk.last)
            coefficient = loss_terms(
                logp[tokens],
                advantages[own],
                torch.tensor(chunk.ends(ends), device=hidden.device),
                denominator,
                loss_options,
                per_token.at(tokens),
                counts=counts[own],
                backend=chosen,
            ).coefficient
            for piece, c in zip(pieces, coefficient.split(R), strict=True):
                if not once:
                    kept = c.nonzero().flatten()
                    piece, c = piece[kept], c[kept]
                    passed = forward(piece, store=True)
                add_gradients(gradients, piece, passed, c, hidden, weight, targets, head, chosen)
                del passed  # the next chunk's probabilities take its place
        terms = loss_terms(
            logp,
            advantages,
            cu_seqlens,
            denominator,
            loss_options,
            per_token._replace(mask=mask, entropy=entropy),
            backend=chosen,
        )
    return terms.loss, terms.metrics, *gradients.in_stored_dtypes(weight, bias)


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    new: Any,
) -> HeadGradients:
    N, H = hidden.shape
    exact = {"dtype": accumulator(hidden), "device": hidden.device}
    rows = N if hidden_grad else 0
    return HeadGradients(
        new((rows, H), dtype=hidden.dtype, device=hidden.device),
        new(rows, **exact),
        new(weight.shape if weight_grad else (0,), **exact),
        new(bias.shape if bias_grad and bias is not None else (0,), **exact),
    )


@_linear_policy_loss.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, hidden_grad, weight_grad, bias_grad, _ = rest
    gradients = _gradients(hidden, weight, bias, hidden_grad, weight_grad, bias_grad, torch.empty)
    loss = hidden.new_empty((), dtype=accumulator(hidden))
    return loss, loss.new_empty(len(METRICS)), *gradients.in_stored_dtypes(weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, bias, *_, ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad, _ = inputs
    ctx.dtypes = weight.dtype, weight.dtype if bias is None else bias.dtype
    ctx.absent = (None,) * (len(inputs) - 3)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    in_units, unit, weight, bias = ctx.saved_tensors
    wanted = ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad
    if any(n and not w for n, w in zip(ctx.needs_input_grad, wanted, strict=False)):
        raise RuntimeError("linear_policy_loss ran without grad mode: it kept no gradients.")
    return (
        scale_rows(grad_loss * unit, in_units, None, in_units) if ctx.hidden_grad else None,
        _scale(grad_loss, weight, ctx.dtypes[0]) if ctx.weight_grad else None,
        _scale(grad_loss, bias, ctx.dtypes[1]) if ctx.bias_grad else None,
        *ctx.absent,
    )


_linear_policy_loss.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("fusedgrpo::scale_gradient", mutates_args=())
def _scale(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return (grad_loss * gradient).to(dtype)


@_scale.register_fake
def _(grad_loss: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


refuse_second_derivative(_scale, "linear_policy_loss")
