"""``x W^T + b`` for a few rows, as many as sequences are decoded at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

# With 2 to 4 rows MKL takes 1.3 times as long for x W^T of a wide W as for the transposed
# product of the same operands; with more rows, or fewer columns out than in, there is no gain
# (docs/measured.md, bench/bench_decode.py).
FEW = range(2, 5)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[..., out]`` of ``x [..., in]`` and ``weight [out, in]``, both of one dtype."""
    rows = x.numel() // x.shape[-1]
    gains = rows in FEW and weight.shape[0] >= weight.shape[1]
    if x.device.type != "cpu" or not gains or x.dtype.itemsize < torch.float32.itemsize:
        return linear(x, weight, bias)
    found = torch.mm(weight, x.reshape(rows, -1).T).T.contiguous()
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], -1)
