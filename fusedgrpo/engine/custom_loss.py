"""A policy loss of the user's own: a function of the tokens, through autograd on ``[N]``.

The head is as fused as ever: the function starts from log-probs, and its gradient by them is what
the backward pass goes on with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.metric_names import is_own_metric
from fusedgrpo.errors import ConfigError, brief
from fusedgrpo.kernels import LossOptions, PolicyLoss, policy_loss
from fusedgrpo.kernels.loss.types import MAX_LOG_RATIO, METRICS
from fusedgrpo.loss_options import LOSS_TYPES
from fusedgrpo.named_code import load_code, locate_code


@dataclass(frozen=True, slots=True)
class LossTokens:
    """The argument of a loss: N tokens of B completions, end to end.

    logp: ``[N]`` float32 under the policy, which alone carries a gradient. old_logp: ``[N]`` at
    sampling time; the values of ``logp`` in the first update on a rollout. ref_logp: ``[N]`` or
    None without ``beta``. advantages: ``[N]``, each completion's for all its tokens. mask: ``[N]``
    bool, False where the result is not used; log-probs are 0 there. cu_seqlens: ``[B+1]``,
    completion i is tokens ``cu_seqlens[i]:cu_seqlens[i+1]``. options: ``epsilon`` and the others
    of the run.
    """

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor | None
    advantages: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    options: LossOptions

    @property
    def log_ratio(self) -> Tensor:
        """``[N]``: ``logp - old_logp``, clamped so that ``exp`` of it is finite."""
        return (self.logp - self.old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def mean(self, x: Tensor) -> Tensor:
        """``[N]``: for each token the mean of ``x [N]`` over its completion's tokens that count."""
        keep = self.mask.to(x.dtype)
        sizes = torch.segment_reduce(keep, "sum", offsets=self.cu_seqlens).clamp(min=1)
        sums = torch.segment_reduce(x * keep, "sum", offsets=self.cu_seqlens)
        rows = torch.arange(len(sizes), device=x.device)
        row = rows.repeat_interleave(self.cu_seqlens.diff(), output_size=len(x))
        return (sums / sizes)[row]


class CustomLoss:
    """``function`` as a loss that is called like ``kernels.policy_loss``.

    function: from ``LossTokens`` to the loss of each token, ``[N]`` float, or to that and a dict of
    metrics, each ``[N]``. The sum over the step's tokens is divided by their number; where
    ``sampler_correction`` weighs tokens, and where ``beta`` adds a KL, that is done here.

    Raises ConfigError where it raises, or returns anything else; it is tried on a few tokens first.
    """

    def __init__(self, name: str, function: Callable[[LossTokens], Any]):
        self.name = name
        self.function = function
        self._try()

    def __call__(
        self,
        logp: Tensor,
        advantages: Tensor,
        cu_seqlens: Tensor,
        *,
        options: LossOptions,
        num_items: float,
        num_sequences: float | None = None,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        mask: Tensor | None = None,
        sampler_ratio: Tensor | None = None,
        entropy: Tensor | None = None,
    ) -> PolicyLoss:
        """Loss and metrics; the arguments are those of ``policy_loss``. num_sequences: not used."""
        keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
        if sampler_ratio is not None:
            keep = keep & sampler_ratio.isfinite()
        logp = torch.where(keep, logp.float(), 0.0)
        old = logp.detach() if old_logp is None else torch.where(keep, old_logp, 0.0)
        ref = None if ref_logp is None else torch.where(keep, ref_logp, 0.0)
        spread = advantages.repeat_interleave(cu_seqlens.diff(), output_size=len(logp))
        value, own = self._called(LossTokens(logp, old, ref, spread, keep, cu_seqlens, options))
        if sampler_ratio is not None:
            value = value * torch.where(keep, sampler_ratio, 1.0)
        loss = torch.where(keep, value, 0.0).sum() / max(num_items, 1)
        # Without advantages all that is left of a loss of ours is its KL.
        rest, metrics = policy_loss(
            logp,
            torch.zeros_like(advantages),
            cu_seqlens,
            old_logp=old,
            ref_logp=ref,
            mask=mask,
            sampler_ratio=sampler_ratio,
            entropy=entropy,
            num_items=num_items,
            **options.to_dict(),
        )
        metrics = {k: v for k, v in metrics.items() if not k.startswith("clip_ratio/")}
        return PolicyLoss(loss + rest, metrics | {k: _mean(x, keep) for k, x in own.items()})

    def _called(self, tokens: LossTokens) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            result = self.function(tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code raises anything
            raise self._wrong(f"raised {type(error).__name__}: {error}") from error
        value, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(metrics, Mapping):
            raise self._wrong(f"returned metrics that are {brief(metrics)}, expected a dict")
        for name, x in {"the loss": value, **metrics}.items():
            if not isinstance(x, Tensor) or x.shape != tokens.logp.shape:
                found = tuple(x.shape) if isinstance(x, Tensor) else brief(x)
                raise self._wrong(f"returned {found} as {name}, expected a tensor [N]")
            if name in METRICS or is_own_metric(str(name)):
                raise self._wrong(f"returned a metric {name!r}, which is one of the trainer's own")
        return value, {str(name): x.detach().float() for name, x in metrics.items()}

    def _try(self) -> None:
        """Call it on seven tokens, and look at the result and its gradient."""
        logp = torch.linspace(-2.0, -0.1, 7).requires_grad_()
        tokens = LossTokens(
            logp=logp,
            old_logp=logp.detach() - 0.1,
            ref_logp=logp.detach() - 0.2,
            advantages=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]),
            mask=torch.ones(7, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, 3, 7]),
            options=LossOptions(beta=0.04),
        )
        value, _ = self._called(tokens)
        if not value.requires_grad:
            raise self._wrong("returned a loss that does not depend on logp")
        (gradient,) = torch.autograd.grad(value.sum(), logp)
        if not value.isfinite().all() or not gradient.isfinite().all():
            raise self._wrong(
                f"returned {value.tolist()} with the gradient {gradient.tolist()} for seven plain "
                "log-probs"
            )

    def _wrong(self, text: str) -> ConfigError:
        return ConfigError(
            f"loss_type {self.name!r} {text}. It is called with a LossTokens and returns the loss "
            "of each token, [N] (docs/extending.md)."
        )


def find_custom_loss(loss_type: str, folders: Sequence[Path]) -> CustomLoss | None:
    """The loss that ``file.py:function`` or ``module:function`` names; None for one of ours.
    Raises ConfigError."""
    if loss_type in LOSS_TYPES:
        return None
    code = locate_code(loss_type, folders, "loss_type", ConfigError)
    assert code is not None  # config/rules.py
    return CustomLoss(loss_type, load_code(code, "loss_type", ConfigError))


def _mean(x: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, x.detach(), 0.0).sum() / keep.sum().clamp(min=1)
