"""Root mean square normalisation (Zhang & Sennrich, 2019, arXiv 1910.07467) in one kernel.

    y = x / sqrt(mean(x^2) + eps)             in float32
    rms_norm = weight * round(y)              with rounds_first, as Llama's descendants have it
             = round(y * (offset + weight))   else; Gemma's offset is 1

A decoded token passes two of them in each layer. Spelled out in torch that is six kernels or more
of a few microseconds each: some 400 of the 1,216 of a token at 7B (docs/measured.md). It has no
gradient: a training forward keeps the model's own, so that scoring and update round alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgrpo.kernels.backend import Backend, resolve_backend
from fusedgrpo.kernels.custom_op import plain_arithmetic_on


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    rounds_first: bool = True,
    offset: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """``[..., H]`` of ``x [..., H]`` and ``weight [H]``; formula in the module's docstring.

    The result has x's dtype, with ``rounds_first`` the one that torch's ``weight * x`` has. offset:
    added to the weights, 0 with ``rounds_first``. A row knows nothing of the others.

    Raises ValueError or TypeError for shapes, dtypes and options that do not fit, RuntimeError
    where a gradient is asked for.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        raise RuntimeError("rms_norm has no gradient: call it under torch.no_grad().")
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}: "
            "expected [..., H] and [H]."
        )
    if not (x.dtype.is_floating_point and weight.dtype.is_floating_point):
        raise TypeError(f"x is {x.dtype} and weight {weight.dtype}: expected floating dtypes.")
    if rounds_first and offset:
        raise ValueError(f"offset={offset} with rounds_first: no model has both.")
    return torch.ops.fusedgrpo.rms_norm(x, weight, eps, rounds_first, float(offset), backend)


@torch.library.custom_op("fusedgrpo::rms_norm", mutates_args=())
def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, rounds_first: bool, offset: float, backend: str
) -> Tensor:
    with plain_arithmetic_on(x):
        if resolve_backend(backend, "rms_norm", x.device, x.dtype) == "triton":
            from fusedgrpo.kernels.norm.rms_norm_triton import rms_norm_triton

            out = _output(x, weight, rounds_first)
            rms_norm_triton(x, weight, eps, rounds_first, offset, out)
            return out
        exact = torch.promote_types(x.dtype, torch.float32)
        y = x.to(exact)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        if rounds_first:
            return weight * y.to(x.dtype)
        return (y * (offset + weight.to(exact))).to(x.dtype)


@_rms_norm.register_fake
def _(
    x: Tensor, weight: Tensor, eps: float, rounds_first: bool, offset: float, backend: str
) -> Tensor:
    return _output(x, weight, rounds_first)


def _output(x: Tensor, weight: Tensor, rounds_first: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype) if rounds_first else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)
