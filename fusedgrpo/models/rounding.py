"""How much of a difference between two forward passes rounding may be.

The same tokens through other shapes, kernels and orders of sums are the same only to rounding, and
what a deep model in 16 bits makes of that depends on its weights: 6 % of the hidden states of a
random 7B model. A fixed tolerance takes either that for an error, or an error for rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def rounded_otherwise(causal_lm: Any, dtype: torch.dtype) -> Iterator[None]:
    """Inside, what a layer of the decoder gets is off by half a unit of its last place in
    ``dtype``, up or down, in one number of eight: about the noise that another order of sums makes
    of a layer's products, or up to twice that (models of 2 to 56 layers in bfloat16)."""
    unit = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)

    def off(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args
        drawn = torch.randint(16, x.shape, generator=generator).to(x.device)
        sign = (drawn == 0).double() - (drawn == 1).double()
        return ((x.double() * (1 + sign * unit / 2)).to(x.dtype), *rest)

    layers = getattr(causal_lm.get_decoder(), "layers", ())
    hooks = [layer.register_forward_pre_hook(off) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
