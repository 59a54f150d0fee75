"""Input and output of one step of decoding, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """M rows, whose last tokens are read and whose next ones are chosen.

    places: ``[M]``, the rows in the decoder's tables. seeds, at: ``[M]``, the noise of the next
    token. positions: ``[M]``, of the last token in its sequence. slots: ``[M]``, where its key is
    kept. own_lengths: ``[M]`` int32. prompt_pages, prompt_lengths, cu_rows: as in
    ``decode_attention``. pages: columns of the tables of own pages that are read.
    """

    places: Tensor
    seeds: Tensor
    positions: Tensor
    slots: Tensor
    at: Tensor
    own_lengths: Tensor
    prompt_pages: Tensor
    prompt_lengths: Tensor
    cu_rows: Tensor
    pages: int

    def __len__(self) -> int:
        return len(self.places)

    def write_into(self, larger: DecodeStep, blank: DecodeStep) -> None:
        """These rows become the first of ``larger``, and its others those of ``blank``: two
        ``RaggedDecoder.blank`` of the same size."""
        M, groups = len(self), len(self.prompt_lengths)
        for name in ("places", "seeds", "positions", "slots", "at", "own_lengths"):
            into: Tensor = getattr(larger, name)
            into[:M].copy_(getattr(self, name))
            into[M:].copy_(getattr(blank, name)[M:])
        larger.prompt_pages[:groups, : self.prompt_pages.shape[1]].copy_(self.prompt_pages)
        larger.prompt_lengths[:groups].copy_(self.prompt_lengths)
        # All blank rows are one group more, which has no prompt; further ones have no rows.
        larger.prompt_lengths[groups:].fill_(0)
        larger.cu_rows[: groups + 1].copy_(self.cu_rows)
        larger.cu_rows[groups + 1 :].fill_(len(larger))


class Said:
    """Tokens and log-probs of a step, ``[M]`` each, on their way to the host."""

    def __init__(self, tokens: Tensor, logp: Tensor):
        self._done: torch.cuda.Event | None = None
        self._host = tokens, logp
        if tokens.device.type == "cuda":
            self._host = _on_its_way(tokens), _on_its_way(logp)
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> tuple[list[int], list[float]]:
        """Waits for the step."""
        if self._done is not None:
            self._done.synchronize()
        tokens, logp = self._host
        return tokens.tolist(), logp.tolist()


def _on_its_way(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
