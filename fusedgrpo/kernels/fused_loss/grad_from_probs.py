"""Gradients of a linear head from stored probabilities and d loss / d logp of each row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Resolved
from fusedgrpo.kernels.logprob.tiles import HeadOptions, RowStatistics
from fusedgrpo.kernels.logprob.vocab_pass import (
    VocabPass,
    as_operand,
    mm_into,
    operand,
    round_operand,
    tile_functions,
)


class HeadGradients(NamedTuple):
    """Where gradients are added up; without rows where they are not wanted.

    The gradient of row t of hidden is ``unit[t] * hidden[t]``: coefficients of 1e-8 a token would
    leave nothing of it in float16.
    """

    hidden: Tensor  # [N, H] of hidden's dtype
    unit: Tensor  # [N]
    weight: Tensor  # [V, H] float32
    bias: Tensor  # [V] float32

    def in_stored_dtypes(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As they are kept until the backward: in the head's dtype, unless that is float16, in
        which they would lose what a loss scale is there to save."""
        stored = (
            x if of is None or of.dtype == torch.float16 else x.to(of.dtype)
            for x, of in ((self.weight, weight), (self.bias, bias))
        )
        return self.hidden, self.unit, *stored  # type: ignore[return-value]


def add_gradients(
    gradients: HeadGradients,
    tokens: Tensor,
    passed: VocabPass,
    coefficient: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: HeadOptions,
    backend: Resolved,
) -> None:
    """Adds what the rows ``tokens [R]`` contribute: ``passed`` holds their probabilities,
    ``coefficient [R]`` is d loss / d logp. Rows whose coefficient is exactly 0 cost nothing.

    Waits for the device twice, for the number of rows with a gradient and for the largest
    coefficient.
    """
    kept, unit = rows_with_gradient(coefficient)
    if not len(kept) or passed.stored is None:
        return
    fn = tile_functions(backend)
    statistics = RowStatistics(*(x[kept] if len(x) else x for x in passed.statistics))
    c = coefficient[kept].to(statistics.logp.dtype)
    factor = c / unit * head.slope
    # dz[target] is rounded to the GEMM's dtype; the error is added back in float32.
    at_target = factor * -torch.expm1(statistics.logp) * passed.softmax.slope_target[kept]
    rounded = as_operand(at_target, weight)
    rows, target = tokens[kept], targets[tokens[kept]]
    h = operand(hidden[rows])
    K = passed.stored.tile_columns
    want_hidden = len(gradients.unit) > 0
    acc = torch.empty(h.shape, dtype=c.dtype, device=c.device) if want_hidden else None
    dz_rK = torch.empty(len(kept), K, dtype=h.dtype, device=h.device)
    for index, lo in enumerate(range(0, len(weight), K)):
        w = operand(weight[lo : lo + K])
        dz = dz_rK[:, : len(w)]
        fn.stored_gradient_tile(
            passed.stored.p[:, lo : lo + K],
            kept,
            target,
            lo,
            passed.stored.high[index],
            statistics,
            factor,
            rounded,
            dz,
        )
        round_operand(dz)
        if acc is not None:
            mm_into(acc, dz, w, add=lo > 0)
        if len(gradients.weight):
            mm_into(gradients.weight[lo : lo + K], dz.T, h, add=True, alpha=unit)
        if len(gradients.bias):
            gradients.bias[lo : lo + K].add_(dz.sum(0, dtype=c.dtype), alpha=unit)
    if acc is not None:
        if rounded is not at_target:
            acc.addcmul_((at_target - rounded)[:, None], weight[target].to(acc.dtype))
        gradients.hidden[rows] = acc.to(gradients.hidden.dtype)
        gradients.unit[rows] = unit


def rows_with_gradient(coefficient: Tensor) -> tuple[Tensor, float]:
    """Which rows have a gradient, and the power of two at their largest coefficient: a unit that
    gradients can be divided and multiplied by without another rounding. Both wait for the device.
    """
    kept = coefficient.nonzero().flatten()
    greatest = float(coefficient.abs().amax()) if len(kept) else 1.0
    return kept, 2.0 ** math.frexp(greatest)[1] if math.isfinite(greatest) else greatest
