"""Prompts and completions laid end to end: what one forward pass sees.

T tokens of a batch, N scored tokens (all completion tokens), B completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B sequences "prompt + completion" without padding.

    input_ids: ``[T]`` int64. cu_seqlens: ``[B+1]`` int64, sequence i is
    ``input_ids[cu_seqlens[i]:cu_seqlens[i+1]]``. cu_completions: ``[B+1]`` int64, the same for the
    ``N`` scored tokens alone. predictors: ``[N]`` int64, where in ``T`` the hidden state sits that
    predicts each scored token (the token before it). max_length: of a sequence, on the host.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    cu_completions: Tensor
    predictors: Tensor
    max_length: int

    @classmethod
    def build(cls, pairs: Sequence[tuple[Ids, Ids]], device: torch.device | str) -> PackedBatch:
        """Pack ``(prompt ids, completion ids)`` pairs. Every prompt needs a token."""
        ids: list[int] = []
        predictors: list[int] = []
        for prompt, completion in pairs:
            if not prompt:
                raise ValueError("A prompt without tokens has nothing to predict from.")
            first = len(ids) + len(prompt) - 1
            predictors.extend(range(first, first + len(completion)))
            ids.extend(prompt)
            ids.extend(completion)
        lengths = [len(prompt) + len(completion) for prompt, completion in pairs]

        def on_device(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            input_ids=on_device(ids),
            cu_seqlens=on_device([0, *accumulate(lengths)]),
            cu_completions=on_device([0, *accumulate(len(c) for _, c in pairs)]),
            predictors=on_device(predictors),
            max_length=max(lengths, default=0),
        )

    @property
    def targets(self) -> Tensor:
        """``[N]`` int64: the scored tokens."""
        return self.input_ids[self.predictors + 1]
