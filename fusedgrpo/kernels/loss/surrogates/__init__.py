"""The surrogates: what a loss takes of a token's ratio and advantage, before the KL.

A file each, with formula, derivative and paper, and beside it the same lines in Triton. Which loss
type takes which surrogate, and how its sum is divided, is the table ``fusedgrpo.loss_options``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fusedgrpo.kernels.loss.surrogates import cispo, clipped, sapo, vespo
from fusedgrpo.kernels.loss.types import TokenTerms
from fusedgrpo.loss_options import LossOptions


class Surrogate(NamedTuple):
    """token_terms: of ratio, advantage, logp and the completion's weight, each ``[N]``.

    completion_weight: ``[B]`` of the logarithm of a completion's importance weight and of its
        advantage, both ``[B]``; where there is none the weight is not looked at.
    """

    token_terms: Callable[[Tensor, Tensor, Tensor, Tensor, LossOptions], TokenTerms]
    completion_weight: Callable[[Tensor, Tensor, LossOptions], Tensor] | None = None


SURROGATES: dict[str, Surrogate] = {
    "clipped": Surrogate(clipped.token_terms),
    "cispo": Surrogate(cispo.token_terms),
    "sapo": Surrogate(sapo.token_terms),
    "vespo": Surrogate(vespo.token_terms, vespo.completion_weight),
}
