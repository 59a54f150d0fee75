"""TRL's padded batches: rows without their padding and back, and the order of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedgrpo.errors import ModelError


def shuffle_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """TRL's ``shuffle_sequence_dict``, with rows of one prompt kept next to each other.

    Groups come in random order and so do the rows of each.
    """
    prompts: dict[tuple[int, ...], list[int]] = {}
    masks = batch["prompt_mask"].bool()
    for row, (ids, mask) in enumerate(zip(batch["prompt_ids"], masks, strict=True)):
        prompts.setdefault(tuple(ids[mask].tolist()), []).append(row)
    groups = list(prompts.values())
    order: list[int] = []
    for g in torch.randperm(len(groups)).tolist():
        order += [groups[g][k] for k in torch.randperm(len(groups[g])).tolist()]

    def permuted(value: Any) -> Any:
        if value is None or (isinstance(value, Tensor) and value.dim() == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order]

    return {name: permuted(value) for name, value in batch.items()}


def unpadded(
    input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and completion of each padded row, without the padding."""
    pairs = []
    split = input_ids.shape[1] - logits_to_keep
    # Read together: the host waits for the device once.
    read = torch.stack([input_ids, attention_mask.to(input_ids.dtype)]).tolist()
    for ids, mask in zip(*read, strict=True):
        prompt = tuple(t for t, m in zip(ids[:split], mask[:split], strict=True) if m)
        completion = tuple(t for t, m in zip(ids[split:], mask[split:], strict=True) if m)
        if not prompt:
            raise ModelError("A prompt without tokens has nothing to predict from.")
        pairs.append((prompt, completion))
    return pairs


def padded(parts: list[tuple[list[int], Tensor]], kept: Tensor, pairs: Sequence[Any]) -> Tensor:
    """``[B, T]``: the values of each row's completion where ``kept`` is true, else 0."""
    sizes = [len(completion) for _, completion in pairs]
    pieces: list[Tensor] = [parts[0][1].new_zeros(0)] * len(pairs)
    for rows, values in parts:
        own = values.split([sizes[i] for i in rows])
        for i, piece in zip(rows, own, strict=True):
            pieces[i] = piece
    flat = torch.cat(pieces)
    return flat.new_zeros(kept.shape).masked_scatter(kept, flat)
