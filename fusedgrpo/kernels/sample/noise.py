"""Where the noise of rows comes from: made in one go for many tokens, used tile by tile."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedgrpo.kernels.sample import philox_numpy
from fusedgrpo.kernels.sample.philox import gumbel_tile


class Noise:
    """The noise of R rows with ``seeds [R]`` and ``positions [R]``, over a vocabulary of V tokens.

    A tile of a few rows is too little work for a call of numpy: ``bits`` looks ahead over as many
    tokens as are worth one, and keeps them for the tiles that follow.
    """

    def __init__(self, seeds: Tensor, positions: Tensor, V: int):
        self.seeds, self.positions, self.V = seeds, positions, V
        self._first, self._bits = 0, np.empty((len(seeds), 0), np.uint32)

    def gumbel(self, lo: int, width: int, dtype: torch.dtype) -> Tensor:
        """``[R, width]``: the noise of tokens ``lo .. lo + width``, on any device."""
        return gumbel_tile(self.seeds, self.positions, lo, width, dtype)

    def bits(self, lo: int, width: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """``[R, width]``: the random bits that noise is made of, on a CPU."""
        if not self._first <= lo <= lo + width <= self._first + self._bits.shape[1]:
            first, after = lo // 4, -(-(lo + width) // 4)
            ahead = min(philox_numpy.TOGETHER // max(len(self.seeds), 1), -(-self.V // 4) - first)
            self._first = 4 * first
            self._bits = philox_numpy.token_bits(
                self.seeds.numpy(), self.positions.numpy(), first, max(after - first, ahead)
            )
        return self._bits[:, lo - self._first : lo - self._first + width]
