"""Liger's fused GRPO loss by signature: what takes ``LigerFusedLinearGRPOLoss`` takes this.

    from fusedgrpo.integrations.liger import FusedLinearGRPOLoss as LigerFusedLinearGRPOLoss

Arguments, order and results are those of Liger 0.8.5; Liger itself need not be installed. Two GEMMs
with a frozen head and three with one that trains, float32 logits, masked tokens not computed.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed
from torch import Tensor

from fusedgrpo.kernels import LossOptions, linear_logprob, linear_policy_loss

log = logging.getLogger("fusedgrpo")


class FusedLinearGRPOLoss(torch.nn.Module):
    """Options as in Liger. ``compiled`` and ``chunk_size`` change nothing here, which is said:
    nothing is compiled, and chunks are chosen for the device.

    What differs, each time towards TRL 1.16: ``luspo`` sums a completion's unmasked tokens also at
    level "token", where Liger weights each of its tokens, masked ones too, by their number; the
    clip metric is taken after ``delta``, and at level "sequence" is a mean over completions, not
    over their tokens. All loss types work at level "sequence".
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        if not compiled or chunk_size != 1:
            log.info("FusedLinearGRPOLoss: compiled and chunk_size have no effect here.")
        self.use_ref_model = use_ref_model
        self.temperature = temperature
        self.options = LossOptions(
            beta=beta,
            epsilon=epsilon_low,
            epsilon_high=epsilon_high,
            loss_type=loss_type,
            max_completion_length=max_completion_length,
            importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            delta=delta,
            use_bias_correction_kl=use_bias_correction_kl,
            vespo_k_pos=vespo_k_pos,
            vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg,
            vespo_lambda_neg=vespo_lambda_neg,
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss, and the metrics ``(kl, clip ratio)``, or ``(clip ratio,)`` with ``beta=0``.

        _input: ``[B, T, H]`` or ``[B * T, H]``. lin_weight: ``[V, H]``. selected_token_ids,
        attention_mask, ref_per_token_logps, old_per_token_logps: ``[B, T]``. advantages: ``[B]``.
        ref_input, ref_weight, ref_bias: the reference's, instead of its log-probs. vllm_is_ratio:
        ``[B, T]`` or ``[B, 1]``. num_items_in_batch: loss tokens of the batch over all processes.
        """
        B, T = selected_token_ids.shape
        hidden = _input.reshape(B * T, -1)
        targets, mask = selected_token_ids.reshape(-1), attention_mask.reshape(-1).bool()
        ref = None if ref_per_token_logps is None else ref_per_token_logps.reshape(-1)
        if ref is None and self.options.beta:
            ref = self._reference(hidden, lin_weight, bias, ref_input, ref_weight, ref_bias,
                                  targets, mask)  # fmt: skip
        ratio = None if vllm_is_ratio is None else vllm_is_ratio.expand(B, T).reshape(-1)
        loss, metrics = linear_policy_loss(
            hidden,
            lin_weight,
            targets,
            advantages,
            torch.arange(B + 1, device=hidden.device) * T,
            options=self.options,
            bias=bias,
            mask=mask,
            old_logp=None if old_per_token_logps is None else old_per_token_logps.reshape(-1),
            ref_logp=ref,
            sampler_ratio=ratio,
            temperature=self.temperature,
            num_items=self._own_items(mask, num_items_in_batch),
        )
        clipped = metrics.get("clip_ratio/region_mean", metrics.get("cispo_clip_ratio"))
        clip_ratio = torch.zeros_like(loss.detach()) if clipped is None else clipped
        return loss, (metrics["kl"], clip_ratio) if self.options.beta else (clip_ratio,)

    def _reference(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        targets: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Log-probs of the reference's hidden states; without ``use_ref_model`` of the policy's."""
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    f"beta={self.options.beta:g} with use_ref_model needs ref_per_token_logps, or "
                    "ref_input and ref_weight."
                )
            hidden, weight, bias = ref_input.reshape(hidden.shape), ref_weight, ref_bias
        with torch.no_grad():
            return linear_logprob(
                hidden, weight, targets, bias=bias, mask=mask, temperature=self.temperature
            ).logp

    def _own_items(self, mask: Tensor, given: float | Tensor | None) -> float | Tensor | None:
        """The denominator of dapo, cispo and vespo: the mean over processes, as Liger has it."""
        if self.options.loss_type == "bnpo":
            return None
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if given is None:
            if not parallel:
                return None
            given = mask.sum().float()
            torch.distributed.all_reduce(given)
        return given / torch.distributed.get_world_size() if parallel else given
