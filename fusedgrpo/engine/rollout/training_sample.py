"""The samples of an optimizer step. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedgrpo.kernels import LossOptions
from fusedgrpo.models.packed_batch import Pair
from fusedgrpo.models.sending import send


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One completion with everything its loss needs.

    in_loss: False leaves its tokens out of the loss and of the token count, as
    ``mask_truncated_completions`` does; it still counts as a sequence. old_logp, ref_logp,
    sampler_logp, sampler_weight: float32 ``[own_tokens]`` on the CPU, or None where not needed.
    selected: bool, the tokens that the surrogate is of, or None for all. given: see ``Completion``.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float
    in_loss: bool = True
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_logp: Tensor | None = None
    sampler_weight: Tensor | None = None
    selected: Tensor | None = None
    given: tuple[tuple[int, int], ...] = ()

    @property
    def pair(self) -> Pair:
        return Pair(self.prompt_ids, self.completion_ids, self.given)

    @property
    def own_tokens(self) -> int:
        """How many tokens of the completion the policy wrote."""
        return len(self.completion_ids) - sum(stop - start for start, stop in self.given)

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss: a weight that is not finite takes its token out."""
        if not self.in_loss:
            return 0
        if self.sampler_weight is None:
            return self.own_tokens
        return int(self.sampler_weight.isfinite().sum())

    @property
    def dropped_tokens(self) -> int:
        """Tokens that a weight that is not finite took out of the loss."""
        return self.own_tokens - self.loss_tokens if self.in_loss else 0


def has_gradient(
    sample: TrainingSample, options: LossOptions, bonus: float, *, custom: bool = False
) -> bool:
    """False for a completion whose gradient is exactly 0: it need not be forwarded, and still
    counts in the denominators. bonus: not 0 if entropy is in the loss. custom: nothing is known of
    it."""
    if not sample.loss_tokens:
        return False
    return custom or bool(sample.advantage or options.beta or bonus)


def concatenated(
    samples: Sequence[TrainingSample], field: str, device: torch.device
) -> Tensor | None:
    """A per-token field of all samples end to end, ``[N]``; None if the samples do not have it."""
    parts = [getattr(sample, field) for sample in samples]
    if any(part is None for part in parts):
        return None
    return send(torch.cat(parts), device)


def loss_mask(samples: Sequence[TrainingSample], device: torch.device) -> Tensor:
    """``[N]`` bool."""
    lengths = torch.tensor([s.own_tokens for s in samples])
    return send(torch.tensor([s.in_loss for s in samples]).repeat_interleave(lengths), device)
