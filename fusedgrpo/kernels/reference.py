"""The truth: each operation with everything materialised, one obvious line per step.

Runs in any floating dtype, float64 for tests (gradcheck), and is differentiable by autograd. No
chunks, no clamps, no care for memory or for confident tokens: use it to check, not to train.
Formulas: TRL 1.16's ``GRPOTrainer``; log-probabilities from Shao et al., 2024 (arXiv 2402.03300).
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from fusedgrpo.kernels.sample.philox import PURPOSE
from fusedgrpo.loss_options import CLIPPED_LOSS_TYPES, LossOptions


def reference_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(logp, entropy)`` of shape ``targets.shape``; 0 where ``mask`` is False."""
    z = _logits(hidden, weight, bias, temperature, logit_scale, softcap)
    logp_all = torch.log_softmax(z, dim=-1)
    logp = logp_all.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp_all.exp() * logp_all).sum(-1)
    if mask is not None:
        logp, entropy = logp.masked_fill(~mask, 0.0), entropy.masked_fill(~mask, 0.0)
    return logp, entropy


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Tensor:
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def reference_linear_sample(
    hidden: Tensor,
    weight: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    greedy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(token [M], logp [M], scores [M, V])``: the token is that of the greatest score."""
    z = _logits(hidden, weight, bias, temperature, logit_scale, softcap)
    scores = z.clone()
    if not greedy:
        for row, (seed, position) in enumerate(
            zip(seeds.tolist(), positions.tolist(), strict=True)
        ):
            for column in range(z.shape[1]):
                scores[row, column] += _gumbel(seed, position, column)
    token = scores.argmax(1)
    return token, torch.log_softmax(z, 1).gather(1, token[:, None])[:, 0], scores


def _gumbel(seed: int, position: int, token: int) -> float:
    key = (seed % 2**32, (seed >> 32) % 2**32)
    counter = (token // 4, position % 2**32, (position >> 32) % 2**32, PURPOSE)
    v = (reference_philox4x32(counter, key)[token % 4] + 0.5) / 2**32
    return -math.log(-math.log1p(-v))


def reference_philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Four random words, by ten rounds of Philox 4x32 (Salmon et al., 2011)."""
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(10):
        product_a, product_c = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (product_c >> 32) ^ b ^ key_0, product_c % 2**32
        c, d = (product_a >> 32) ^ d ^ key_1, product_a % 2**32
        key_0, key_1 = (key_0 + 0x9E3779B9) % 2**32, (key_1 + 0xBB67AE85) % 2**32
    return a, b, c, d


def reference_group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    weights: Tensor | None = None,
    scale_rewards: str = "group",
    multi_objective_aggregation: str = "sum_then_normalize",
    eps: float = 1e-4,
) -> Tensor:
    """``[B]`` advantages of ``[B]`` or ``[B, F]`` rewards, group by group in a Python loop."""
    rewards = rewards.reshape(len(rewards), -1)
    weights = rewards.new_ones(rewards.shape[1]) if weights is None else weights.to(rewards)
    groups = [(group_ids == g).nonzero().flatten() for g in group_ids.unique()]
    unscorable = rewards.isnan().all(1)

    if multi_objective_aggregation == "normalize_then_sum":
        z = torch.full_like(rewards, torch.nan)
        for rows in groups:
            for f in range(rewards.shape[1]):
                z[rows, f] = _centred(rewards[rows, f]) / (_nanstd(rewards[rows, f]) + eps)
        total = (weights * z).nansum(1).masked_fill(unscorable, torch.nan)
        advantages = _centred(total) / (_nanstd(total) + eps)
    else:
        total = (weights * rewards).nansum(1).masked_fill(unscorable, torch.nan)
        advantages = torch.empty_like(total)
        for rows in groups:
            advantages[rows] = _centred(total[rows])
            if scale_rewards == "group":
                advantages[rows] /= _nanstd(total[rows]) + eps
        if scale_rewards == "batch":
            advantages = advantages / (_nanstd(total) + eps)
    return advantages.nan_to_num(nan=0.0)


def _centred(x: Tensor) -> Tensor:
    return x - x.nanmean()


def _nanstd(x: Tensor) -> Tensor:
    kept = x[~x.isnan()]
    if len(x) == 1:
        return torch.zeros((), dtype=x.dtype, device=x.device)
    return kept.std() if len(kept) > 1 else x.new_tensor(torch.nan)


def reference_policy_loss(
    logp: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    options: LossOptions,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    sampler_ratio: Tensor | None = None,
    num_items: float | None = None,
    num_sequences: float | None = None,
) -> Tensor:
    """The scalar loss of ragged ``[N]`` log-probs, one sequence after the other."""
    o = options
    ends = cu_seqlens.tolist()
    old_logp = logp.detach() if old_logp is None else old_logp
    mask = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    num_items = max(int(mask.sum()), 1) if num_items is None else num_items
    num_sequences = len(advantages) if num_sequences is None else num_sequences
    loss = logp.sum() * 0.0
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        keep = mask[start:end]
        lp, old = logp[start:end][keep], old_logp[start:end][keep]
        if len(lp) == 0:
            continue
        advantage = advantages[i]
        log_ratio = lp - old
        if o.importance_sampling_level == "sequence":
            log_ratio_used = log_ratio.mean().expand_as(lp)
        else:
            log_ratio_used = log_ratio
        ratio = log_ratio_used.exp()

        if o.loss_type in CLIPPED_LOSS_TYPES:
            capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
            clipped = ratio.clamp(1 - o.epsilon, 1 + o.upper)
            token_loss = -torch.minimum(capped * advantage, clipped * advantage)
        elif o.loss_type == "cispo":
            token_loss = -ratio.clamp(max=o.upper).detach() * advantage * lp
        elif o.loss_type == "sapo":
            t = o.sapo_temperature_pos if advantage > 0 else o.sapo_temperature_neg
            token_loss = -torch.sigmoid(t * (ratio - 1)) * 4 / t * advantage
        else:
            log_w = log_ratio.detach().clamp(-20, 20).sum()
            if sampler_ratio is not None:
                log_w = (
                    log_w + sampler_ratio[start:end][keep].clamp(min=1e-8).log().clamp(max=20).sum()
                )
            log_w = log_w.clamp(min=math.log(1e-8), max=20)
            positive = advantage >= 0
            k = o.vespo_k_pos if positive else o.vespo_k_neg
            lam = o.vespo_lambda_pos if positive else o.vespo_lambda_neg
            phi = (lam + k * log_w - lam * log_w.exp()).exp()
            token_loss = -phi * advantage * lp

        if sampler_ratio is not None and o.loss_type != "vespo":
            token_loss = token_loss * sampler_ratio[start:end][keep]
        if o.beta:
            assert ref_logp is not None
            d = ref_logp[start:end][keep] - lp
            kl = d.exp() - d - 1
            token_loss = token_loss + o.beta * (kl * ratio if o.use_bias_correction_kl else kl)

        if o.loss_type in ("grpo", "sapo"):
            loss = loss + token_loss.mean() / num_sequences
        elif o.loss_type == "luspo":
            loss = loss + token_loss.sum() / num_sequences
        elif o.loss_type == "dr_grpo":
            assert o.max_completion_length is not None
            loss = loss + token_loss.sum() / (num_sequences * o.max_completion_length)
        else:
            loss = loss + token_loss.sum() / num_items
    return loss


def reference_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prompt_pages: Tensor,
    prompt_lengths: Tensor,
    cu_rows: Tensor,
    own_pages: Tensor,
    own_lengths: Tensor,
    *,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``[M, h, d]``: for each row the keys of its prompt and its own, end to end, and a softmax."""
    page = keys.shape[1]
    rows = []
    for m, q in enumerate(query):
        g = next(g for g, end in enumerate(cu_rows[1:]) if m < end)
        P, n = int(prompt_lengths[g]), int(own_lengths[m])
        places = [prompt_pages[g, i // page] * page + i % page for i in range(P)]
        places += [own_pages[m, i // page] * page + i % page for i in range(n)]
        seen = torch.stack(places)[-(window or P + n) :]
        k, v = (x.flatten(0, 1)[seen].transpose(0, 1) for x in (keys, values))  # [h_kv, keys, d]
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        s = (k @ q[:, :, None])[:, :, 0] * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        rows.append((s.softmax(-1)[:, None] @ v)[:, 0])
    return torch.stack(rows)


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
    """``[..., H]`` float64: ``x / sqrt(mean(x^2) + eps) * (offset + weight)``."""
    y = x.double()
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())
