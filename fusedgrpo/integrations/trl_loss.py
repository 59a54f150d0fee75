"""``GRPOTrainer._compute_loss`` of TRL 1.16 through our ``policy_loss``: same values, same metrics.

TRL's conventions: the loss is divided for gradient accumulation here, its denominators are those of
the micro-batch or of the generation batch, and each metric is a mean over all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.errors import ConfigError
from fusedgrpo.kernels import LossOptions, policy_loss
from fusedgrpo.kernels.loss.selection import near_policy

# Options that ``compute_loss`` does not cover: does a trainer use them?
_UNCOVERED: dict[str, Callable[[Any], bool]] = {
    "top_entropy_quantile with loss_type='vespo'": lambda trainer: (
        trainer.loss_type == "vespo" and trainer.top_entropy_quantile < 1.0
    ),
    "off_policy_mask_threshold with loss_type='vespo'": lambda trainer: (
        trainer.loss_type == "vespo" and trainer.off_policy_mask_threshold is not None
    ),
    "use_adaptive_entropy": lambda trainer: trainer.use_adaptive_entropy,
    "a multimodal processing_class": lambda trainer: trainer._is_vlm,
}


def uncovered(trainer: Any) -> list[str]:
    """The options in use that ``fused_loss`` does not cover."""
    return [name for name, used in _UNCOVERED.items() if used(trainer)]


def refuse_uncovered(trainer: Any) -> None:
    """ConfigError naming every option of the trainer that ``fused_loss`` does not cover."""
    if names := uncovered(trainer):
        raise ConfigError(
            f"fused_loss=True does not cover {', '.join(names)}: leave fused_loss out, and TRL's "
            "own loss runs on our forward pass."
        )


def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The scalar loss; metrics go to ``trainer._metrics``, as TRL's do."""
    mask = inputs["completion_mask"].bool()
    if "tool_mask" in inputs:  # tokens of tools and environments are read, not learned
        mask = mask & inputs["tool_mask"].bool()
    advantages = inputs["advantages"]
    if advantages.dim() != 1:
        raise ValueError(
            f"advantages has shape {tuple(advantages.shape)}: expected one per completion."
        )
    logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        mask.shape[1],
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
    )
    high_entropy = None
    if trainer.top_entropy_quantile < 1.0:
        high_entropy = trainer.get_high_entropy_mask(
            entropies, mask, 1 - trainer.top_entropy_quantile
        )
    weights = _surrogate_weights(trainer, inputs, mask, logps.detach(), high_entropy)
    mode = "train" if trainer.model.training else "eval"
    steps = trainer.current_gradient_accumulation_steps if mode == "train" else 1
    options = loss_options(trainer)
    counts = mask.sum(1)

    def tokens(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.expand(mask.shape)[mask]

    loss, metrics = policy_loss(
        logps[mask],
        advantages,
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        old_logp=tokens(inputs.get("old_per_token_logps")),
        ref_logp=tokens(inputs["ref_per_token_logps"]) if options.beta else None,
        sampler_ratio=tokens(weights),
        entropy=entropies.detach()[mask],
        num_items=_num_items(trainer, inputs, options, counts, mode, steps),
        num_sequences=len(mask) * steps,
        **options.to_dict(),
    )
    if trainer._entropy_bonus_enabled:
        # A mean over tokens for every loss type, divided for accumulation like the loss.
        scaled = options.loss_type not in ("dapo", "cispo", "vespo")
        policy = loss.detach() * (steps if scaled else 1)
        acts_on = mask if high_entropy is None else high_entropy
        bonus = torch.where(acts_on, entropies, 0.0).sum() / acts_on.sum().clamp(min=1) / steps
        loss = loss - trainer.entropy_coef * bonus
        own = trainer._metrics[mode]
        own["policy_loss"].append(trainer.accelerator.gather(policy).nanmean().item())
        if mode == "train" and trainer.accelerator.sync_gradients:
            own["entropy_coef"].append(trainer.entropy_coef)
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * aux_loss / steps
        balance = trainer.accelerator.gather_for_metrics(aux_loss.detach()).mean().item()
        trainer._metrics[mode]["aux_loss"].append(balance)
    _log(trainer, trainer._metrics[mode], metrics, counts, advantages, options)
    return loss


def loss_options(trainer: Any) -> LossOptions:
    """TRL's trainer attributes and arguments as ours."""
    args = trainer.args
    names = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg",
             "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg")  # fmt: skip
    return LossOptions(
        loss_type=trainer.loss_type,
        importance_sampling_level=trainer.importance_sampling_level,
        epsilon=trainer.epsilon_low,
        epsilon_high=trainer.epsilon_high,
        beta=trainer.beta,
        max_completion_length=trainer.max_completion_length,
        **{name: getattr(args, name) for name in names},
    )


def _surrogate_weights(
    trainer: Any,
    inputs: dict[str, Any],
    mask: Tensor,
    logps: Tensor,
    high_entropy: Tensor | None,
) -> Tensor | None:
    """The factor of each token's loss in TRL before it adds the KL, ``[B, T]`` or ``[B, 1]``:
    vLLM's importance ratio, 0 for off-policy completions and outside ``high_entropy [B, T]``."""
    factors = [] if high_entropy is None else [high_entropy]
    if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
        factors.append(inputs["importance_sampling_ratio"])
    if trainer.off_policy_mask_threshold is not None:
        old = inputs.get("old_per_token_logps")
        factors.append(
            near_policy(
                logps[mask],
                inputs.get("sampling_per_token_logps", logps if old is None else old)[mask],
                inputs["advantages"],
                mask[mask],
                torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)),
                trainer.off_policy_mask_threshold,
            )[:, None]
        )
    return math.prod(factors[1:], start=factors[0].to(logps)) if factors else None


def _num_items(
    trainer: Any,
    inputs: dict[str, Any],
    options: LossOptions,
    counts: Tensor,
    mode: str,
    steps: int,
) -> Tensor:
    """The denominator of the losses over tokens."""
    if options.loss_type == "bnpo":
        return counts.sum().clamp(min=1) * steps
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    # num_items_in_batch spans the generation batch: here, one accumulation window of it.
    return items * steps / trainer.args.steps_per_generation if mode == "train" else items


def _log(
    trainer: Any,
    own: dict[str, list[float]],
    metrics: dict[str, Tensor],
    counts: Tensor,
    advantages: Tensor,
    options: LossOptions,
) -> None:
    """Appends the means over all processes. In a mean over completions TRL counts those without a
    token too, with a ratio of 1."""
    accelerator = trainer.accelerator
    by_sequence = options.importance_sampling_level == "sequence"
    some, everyone = (counts > 0).sum(), torch.tensor(len(counts), device=counts.device)
    for name, value in metrics.items():
        if name in ("log_ratio_clamped", "sampling/dropped_tokens"):
            continue  # TRL has no such metric
        if name.endswith(("low_min", "high_max")):
            if by_sequence and some < everyone:
                value = value.clamp(max=0) if name.endswith("min") else value.clamp(min=0)
            if not by_sequence:
                value = torch.where(some > 0, value, torch.nan)
            gathered = accelerator.gather(value)
            gathered = gathered[~gathered.isnan()]
            extreme = torch.amin if name.endswith("min") else torch.amax
            own[name].append(extreme(gathered).item() if len(gathered) else math.nan)
            continue
        if name == "vespo/phi_seq_mean":
            total, count = value * everyone, everyone
        elif by_sequence and name.startswith(("clip_ratio/", "cispo_")):
            total, count = value * some, everyone
            if name == "cispo_clip_ratio" and options.upper < 1:
                total = total + ((counts == 0) & (advantages > 0)).sum()
        else:
            total, count = value * counts.sum(), counts.sum()
        totals = accelerator.reduce(torch.stack([total, count.to(total)]), reduction="sum")
        own[name].append((totals[0] / totals[1].clamp(min=1)).item())
