"""GRPO's loss for padded tensors: three lines in anybody's training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend
from fusedgrpo.kernels.fused_loss.op import linear_policy_loss
from fusedgrpo.loss_options import LossOptions


class GRPOLoss(torch.nn.Module):
    """From the last hidden states to the loss, without logits.

        loss_fn = GRPOLoss(loss_type="dapo", beta=0.04, temperature=0.7)
        loss, metrics = loss_fn(hidden, lm_head.weight, ids, mask, advantages, old_logps, ref_logps)
        loss.backward()

    ``options`` are those of ``LossOptions`` (TRL's names and defaults); temperature, logit_scale
    and softcap are the head's, as in ``linear_logprob``.
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        backend: Backend = "auto",
        **options: Any,
    ):
        super().__init__()
        self.options = LossOptions(**options)
        self.head: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        advantages: Tensor,
        old_logps: Tensor | None = None,
        ref_logps: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        sampler_ratio: Tensor | None = None,
        num_items: float | Tensor | None = None,
        num_sequences: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (scalar) and metrics (scalars on its device).

        hidden: ``[B, T, H]``, ``hidden[:, t]`` is the state that predicts ``completion_ids[:, t]``.
        weight: ``[V, H]``. completion_ids: ``[B, T]`` int64. completion_mask: ``[B, T]`` bool or
        0/1; where it is 0 nothing is computed or read. advantages: ``[B]`` or ``[B, 1]``.
        old_logps, ref_logps, sampler_ratio: ``[B, T]``. bias: ``[V]``.
        num_items, num_sequences: the denominators of ``policy_loss``; give them those of the whole
        optimizer step when gradients are accumulated over several calls.
        """
        if hidden.dim() != 3 or completion_ids.shape != hidden.shape[:2]:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)} and completion_ids "
                f"{tuple(completion_ids.shape)}: expected [B, T, H] and [B, T]."
            )
        B, T = completion_ids.shape
        per_token = {
            "completion_mask": completion_mask,
            "old_logps": old_logps,
            "ref_logps": ref_logps,
            "sampler_ratio": sampler_ratio,
        }
        for name, x in per_token.items():
            if x is not None and x.shape != (B, T):
                raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {(B, T)}.")
        if advantages.numel() != B:
            raise ValueError(
                f"advantages has shape {tuple(advantages.shape)}: expected ({B},) or ({B}, 1)."
            )
        mask, old, ref, ratio = (None if x is None else x.reshape(-1) for x in per_token.values())
        assert mask is not None
        loss, metrics = linear_policy_loss(
            hidden.reshape(B * T, -1),
            weight,
            completion_ids.reshape(-1),
            advantages.reshape(-1),
            torch.arange(B + 1, device=hidden.device) * T,
            options=self.options,
            bias=bias,
            mask=mask.bool(),
            old_logp=old,
            ref_logp=ref,
            sampler_ratio=ratio,
            num_items=num_items,
            num_sequences=num_sequences,
            **self.head,
        )
        return loss, metrics

    def extra_repr(self) -> str:
        return f"{self.options}"
