"""The surrogates in Triton, by the names of ``SURROGATES``; the kernel gets them as constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedgrpo.kernels.loss.surrogates import (
    cispo_triton,
    clipped_triton,
    sapo_triton,
    vespo_triton,
)
from fusedgrpo.loss_options import LossOptions


class TritonSurrogate(NamedTuple):
    """token_terms, completion_weight: device functions, as in ``Surrogate``.

    constants: what of the options is compiled into them, a NamedTuple.
    """

    token_terms: Any
    constants: Callable[[LossOptions], tuple[float | None, ...]]
    completion_weight: Any = None


SURROGATES: dict[str, TritonSurrogate] = {
    "clipped": TritonSurrogate(clipped_triton.token_terms, clipped_triton.constants),
    "cispo": TritonSurrogate(cispo_triton.token_terms, cispo_triton.constants),
    "sapo": TritonSurrogate(sapo_triton.token_terms, sapo_triton.constants),
    "vespo": TritonSurrogate(
        vespo_triton.token_terms, vespo_triton.constants, vespo_triton.completion_weight
    ),
}
