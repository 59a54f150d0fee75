"""From the model's logits to those of the distribution that is sampled from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgrpo.engine.rollout.sampler import SamplingParams


def only_allowed(scores: Tensor, bits: Tensor) -> Tensor:
    """``scores [M, V]`` with -inf for every token whose bit is not set in ``bits [M, W]``, uint8,
    the lowest bit of a byte first; tokens that have none are not allowed.

    It comes before the chain of ``warpers``: transformers has it behind the repetition penalty,
    which leaves -inf as it is, and before all others, which see the tokens that are left alone.
    """
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    set_ = (bits[:, :, None] >> places & 1).flatten(1)
    wide = torch.nn.functional.pad(set_, (0, scores.shape[1] - set_.shape[1]))  # or cut
    return scores.masked_fill(wide == 0, -torch.inf)


def warpers(params: SamplingParams) -> Any:
    """The chain of transformers' logits processors, in generate's order."""
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if not params.greedy:
        if params.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            chain.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            chain.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            chain.append(MinPLogitsWarper(params.min_p))
    return chain
