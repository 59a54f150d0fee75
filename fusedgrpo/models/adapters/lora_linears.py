"""Linear layers with LoRA on frozen weights that are given one input, as one function of autograd.

    y_i = W_i x + b_i + sum_j s_ij B_ij A_ij x

with all s A in one product, z = (s A) x, of which z_ij are the columns of an adapter. For the
backward pass x and z are kept, once for all layers; gradients are those of x, A and B:

    dz = [dy_1 B_1, dy_2 B_2, ...]      dA = s dz^T x      dB_ij = dy_i^T z_ij
    dx = dz (s A) + sum_i dy_i W_i

Products are added up where they are made. A weight in 4 bits is dequantised for the forward and for
the backward pass, one layer after the other, and is nowhere in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusedgrpo.models.four_bit import dense_weight


class Factors(NamedTuple):
    """One adapter of a layer. A: ``[r, in]``. B: ``[out, r]``."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.A)


class LoraLinear(NamedTuple):
    """A frozen linear layer, which is called for ``W x + b``, and its adapters."""

    base: Any
    adapters: Sequence[Factors]

    @property
    def rank(self) -> int:
        return sum(factors.rank for factors in self.adapters)

    def up(self, dtype: torch.dtype) -> Tensor:
        """``[out, rank]``: all B side by side."""
        return _joined([factors.B for factors in self.adapters], 1).to(dtype)


def lora_linears(x: Tensor, layers: Sequence[LoraLinear], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``[..., out_i]`` for each of ``layers``, of ``x [..., in]``; up to rounding

        base(x) + sum(scaling * (x @ A.T) @ B.T for A, B, scaling in adapters)

    Products are in ``dtype``: that of autocast where it is on, else the one that x and all weights
    have. Results have the dtype of ``base(x)``. What the bases are made of gets no gradient, and
    gradients cannot be differentiated again.
    """
    factors = [tensor for layer in layers for A, B, _ in layer.adapters for tensor in (A, B)]
    used: list[Tensor] = []
    inner = _Inner.apply(x, layers, dtype, used, *factors)
    found: tuple[Tensor, ...] = _LoraLinears.apply(inner, x, layers, dtype, used, *factors)
    return found


class _Inner(torch.autograd.Function):
    """z, and all that the backward pass of ``_LoraLinears`` needs, which reads it here and leaves
    nothing to do.

    A node of its own for gradient checkpointing: that computes anew up to what was kept last. Were
    it kept by ``_LoraLinears``, behind the products of the frozen weights, those of the last layer
    of a block would be computed a second time for nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: Sequence[LoraLinear],
        dtype: torch.dtype,
        used: list[Tensor],
        *factors: Tensor,
    ) -> Tensor:
        given = x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            down = _joined(_scaled(factors[::2], layers), 0).to(dtype)
            ups = [layer.up(dtype) for layer in layers]
            inner = _rows(given) @ down.T
        used += given, *ups
        # The weights, so that one which changes before the backward pass is an error.
        weights = [layer.base.weight for layer in layers]
        ctx.save_for_backward(given, inner, down, *ups, *weights)
        ctx.set_materialize_grads(False)
        ctx.inputs = 4 + len(factors)
        return inner

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_inner: None) -> tuple[None, ...]:
        return (None,) * ctx.inputs


class _LoraLinears(torch.autograd.Function):
    """used: what ``_Inner`` has of x and of all B, taken out."""

    @staticmethod
    def forward(
        ctx: Any,
        inner: Tensor,
        x: Tensor,
        layers: Sequence[LoraLinear],
        dtype: torch.dtype,
        used: list[Tensor],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        given, *ups = used
        used.clear()
        # Called as they are, with the caller's autocast: the same bits as without adapters.
        outputs = [_called(layer.base, given, x.dtype) for layer in layers]
        with torch.autocast(x.device.type, enabled=False):
            for out, z, up in zip(outputs, _columns(inner, layers), ups, strict=True):
                _add_product(out.view(-1, out.shape[-1]), z, up.T)
        ctx.kept = inner.grad_fn
        ctx.layers, ctx.shape, ctx.dtypes = layers, x.shape, (x.dtype, dtype)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers: Sequence[LoraLinear] = ctx.layers
        own_dtype, dtype = ctx.dtypes
        _, needs_x, _, _, _, *needs_factors = ctx.needs_input_grad
        given, inner, down, *others = ctx.kept.saved_tensors
        ups = others[: len(layers)]
        with torch.autocast(given.device.type, enabled=False):
            flat = [_rows(grad).to(dtype) for grad in grads]
            d_inner = _joined([g @ up for g, up in zip(flat, ups, strict=True)], 1)
            d_x = None
            if needs_x:
                d_x = d_inner @ down
                for g, layer in zip(flat, layers, strict=True):
                    d_x.addmm_(g, dense_weight(layer.base, dtype))
                d_x = d_x.view(ctx.shape).to(own_dtype)
            d_factors: list[Tensor | None] = [None] * len(needs_factors)
            if any(needs_factors[::2]):
                d_factors[::2] = _d_down(d_inner.T @ _rows(given), layers)
            if any(needs_factors[1::2]):
                columns = zip(flat, _columns(inner, layers), layers, strict=True)
                d_factors[1::2] = [d for g, z, layer in columns for d in _d_up(g.T @ z, layer)]
        return None, d_x, None, None, None, *d_factors


def _called(base: nn.Module, given: Tensor, dtype: torch.dtype) -> Tensor:
    """``base(x)`` for an x in ``dtype`` that was cast already. A layer in 4 bits gives back the
    dtype that it gets, and any other one that of autocast."""
    out: Tensor = base(given)
    return out if type(base) is nn.Linear else out.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _columns(inner: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    return inner.split([layer.rank for layer in layers], 1)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b


def _d_down(total: Tensor, layers: Sequence[LoraLinear]) -> list[Tensor]:
    """The gradient of each A, of that of all s A ``[R, in]``."""
    adapters = [factors for layer in layers for factors in layer.adapters]
    parts = total.to(adapters[0].A.dtype).split([factors.rank for factors in adapters])
    return _scaled([d.to(f.A.dtype) for d, f in zip(parts, adapters, strict=True)], layers)


def _d_up(total: Tensor, layer: LoraLinear) -> list[Tensor]:
    """The gradient of each B of ``layer``, of that of all of them ``[out, rank]``."""
    parts = total.split([factors.rank for factors in layer.adapters], 1)
    return [d.to(f.B.dtype) for d, f in zip(parts, layer.adapters, strict=True)]


def _scaled(tensors: Sequence[Tensor], layers: Sequence[LoraLinear]) -> list[Tensor]:
    """One tensor of each adapter, times its scaling."""
    scalings = [factors.scaling for layer in layers for factors in layer.adapters]
    return list(torch._foreach_mul(list(tensors), scalings))  # in one launch on a GPU


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
