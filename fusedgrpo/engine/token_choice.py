"""The tokens that the policy learns from, where these are not all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedgrpo.engine.rollout.training_sample import TrainingSample, concatenated, loss_mask
from fusedgrpo.kernels.loss.selection import entropy_threshold, near_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChoice:
    """top_entropy: the share of the step's tokens, those with the most entropy, that count; 1 for
    all. off_policy: completions with a negative advantage that are further than this from the
    policy that ``by_sampler`` says (the sampler's own log-probs, or the policy's when it sampled)
    do not; None for any distance. The KL is that of all tokens in any case."""

    top_entropy: float = 1.0
    off_policy: float | None = None
    by_sampler: bool = False

    def select(
        self,
        samples: Sequence[TrainingSample],
        counted: Sequence[int],
        entropies: Sequence[Tensor],
    ) -> tuple[list[TrainingSample], int]:
        """``samples`` with the tokens of the most entropy marked, and the number of these.

        entropies: ``[own_tokens]`` for each of the ``counted``, which are in the loss.
        """
        marked = list(samples)
        masks = []
        for i, entropy in zip(counted, entropies, strict=True):
            weight = samples[i].sampler_weight
            masks.append(torch.ones_like(entropy).bool() if weight is None else weight.isfinite())
        nothing = torch.zeros(0)
        inside = [e[mask] for e, mask in zip(entropies, masks, strict=True)]
        threshold = entropy_threshold(torch.cat([nothing, *inside]), self.top_entropy)
        for i in range(len(samples)):
            none = torch.zeros(samples[i].own_tokens, dtype=torch.bool)
            marked[i] = dataclasses.replace(samples[i], selected=none)
        total = 0
        for i, entropy, mask in zip(counted, entropies, masks, strict=True):
            selected = mask & (entropy >= threshold)
            total += int(selected.sum())
            marked[i] = dataclasses.replace(samples[i], selected=selected)
        return marked, total

    def weights(
        self,
        batch: Sequence[TrainingSample],
        weight: Tensor | None,
        logp: Tensor,
        old_logp: Tensor | None,
        advantages: Tensor,
        cu_seqlens: Tensor,
    ) -> Tensor | None:
        """``[N]``: what the surrogate of each token is multiplied with, ``weight`` among it; None
        for nothing. old_logp: None in the first update, in which no completion is off policy."""
        factors: list[Tensor] = []
        if (selected := concatenated(batch, "selected", logp.device)) is not None:
            factors.append(selected)
        old = concatenated(batch, "sampler_logp", logp.device) if self.by_sampler else old_logp
        if self.off_policy is not None and old is not None:
            mask = loss_mask(batch, logp.device)
            mask = mask if weight is None else mask & weight.isfinite()
            near = near_policy(logp, old, advantages, mask, cu_seqlens, self.off_policy)
            factors.append(near.repeat_interleave(cu_seqlens.diff(), output_size=len(logp)))
        for factor in factors:
            # A weight that is not finite stays so, times 0 as well: its token is dropped.
            weight = factor.to(logp.dtype) if weight is None else weight * factor
        return weight
