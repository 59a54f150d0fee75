"""One pass of hidden states over the vocabulary under an online softmax, in plain torch.

Shapes: R rows of a chunk, K columns of a tile, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """What happens to a logit between the GEMM and the softmax."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature!r}: expected a finite number > 0.")
        if not (math.isfinite(self.logit_scale) and self.logit_scale != 0):
            raise ValueError(f"logit_scale={self.logit_scale!r}: expected a finite number, not 0.")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap!r}: expected None or a number > 0.")

    @property
    def slope(self) -> float:
        """dz / d(hidden @ weight.T), without the softcap's part."""
        return self.logit_scale / self.temperature

    def logits(self, h_RH: Tensor, w_KH: Tensor, bias_K: Tensor | None) -> Tensor:
        """Tile ``z [R, K]`` in the accumulator's dtype."""
        z = mm(h_RH, w_KH.T)
        if bias_K is not None:
            z += bias_K
        if self.softcap is None:
            return z.mul_(self.slope)
        return z.mul_(self.logit_scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def softcap_slope(self, z: Tensor) -> Tensor | None:
        """d softcap(x) / dx at the tile's logits; None where there is no softcap."""
        if self.softcap is None:
            return None
        return 1 - (z * (self.temperature / self.softcap)).square()


def tile_shape(device_type: str) -> tuple[int, int]:
    """Rows and columns of a logits tile.

    Of neither N nor whether gradients are needed: the same row gives the same bits in every pass.
    """
    return (4096, 16384) if device_type == "cuda" else (1024, 4096)


def accumulator(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def operand(x: Tensor) -> Tensor:
    """``x`` as the GEMMs take it: as it is on CUDA, in the accumulator's dtype on CPU, where a
    low-precision GEMM would round its result."""
    return x if x.device.type == "cuda" else x.to(accumulator(x))


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of two operands, accumulated and returned in float32 (float64 for float64)."""
    if b.dtype in (torch.float32, torch.float64):
        return a @ b
    return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)


def softplus_exact(x: Tensor) -> Tensor:
    """``log(1 + exp(x))``; torch's default turns linear at 20, too early for float64."""
    return softplus(x, threshold=40)


def target_column(target_R: Tensor, lo: int, width: int) -> tuple[Tensor, Tensor]:
    """``[R, 1]`` twice: is the target in ``lo .. lo + width``, and its column there, clamped."""
    column = (target_R - lo)[:, None]
    return (column >= 0) & (column < width), column.clamp(0, width - 1)


class VocabPass(NamedTuple):
    """What one pass leaves for R rows; all in the accumulator's dtype."""

    logp: Tensor  # [R]
    lse: Tensor  # [R] log-sum-exp over the whole vocabulary
    entropy: Tensor | None  # [R]
    u: Tensor | None  # [R, H] d logp / d hidden
    v: Tensor | None  # [R, H] d entropy / d hidden


def vocab_pass(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    head: HeadOptions,
    *,
    want_entropy: bool,
    want_u: bool,
    want_v: bool,
) -> VocabPass:
    """The online softmax over the columns that are not the target, for the rows of ``h [R, H]``."""
    R, V = len(h), len(weight)
    _, K = tile_shape(h.device.type)
    dtype = accumulator(h)
    new: dict[str, Any] = {"dtype": dtype, "device": h.device}
    h = operand(h)
    high = torch.full((R,), -torch.inf, **new)  # running maximum
    total = torch.zeros(R, **new)  # sum of exp(z - high)
    first = torch.zeros(R, **new)  # sum of exp(z - high) * (z - high)
    z_target = torch.zeros(R, **new)
    slope_target = torch.ones(R, **new)
    acc = torch.zeros(h.shape, **new) if want_u or want_v else None  # sum of exp(.) W
    acc_first = torch.zeros(h.shape, **new) if want_v else None  # sum of exp(.) (z - high) W

    for lo in range(0, V, K):
        w = operand(weight[lo : lo + K])
        z = head.logits(h, w, None if bias is None else bias[lo : lo + K])
        here, column = target_column(target, lo, len(w))
        slope = head.softcap_slope(z)
        z_target = torch.where(here, z.gather(1, column), z_target[:, None])[:, 0]
        if slope is not None:
            slope_target = torch.where(here, slope.gather(1, column), slope_target[:, None])[:, 0]
        z.scatter_(1, column, torch.where(here, -torch.inf, z.gather(1, column)))

        new_high = torch.maximum(high, z.amax(1))
        # Where no other column was seen yet the maximum is -inf, and 0 stands in for it.
        base = torch.where(new_high.isinf(), 0.0, new_high)
        shift = torch.where(high.isinf(), 0.0, high - base)
        rescale = torch.where(high.isinf(), 0.0, shift.exp())
        z -= base[:, None]
        p = z.exp()
        pz = p * z.masked_fill_(z.isinf(), 0.0) if want_entropy or want_v else None
        if pz is not None:
            first = rescale * (first + shift * total) + pz.sum(1)
        total = rescale * total + p.sum(1)
        if acc_first is not None and acc is not None and pz is not None:
            acc_first.add_(acc * shift[:, None]).mul_(rescale[:, None])
            acc_first += mm(pz if slope is None else pz * slope, w)
        if acc is not None:
            acc.mul_(rescale[:, None])
            acc += mm(p if slope is None else p.mul_(slope), w)
        high = new_high

    others = total.log() + torch.where(high.isinf(), 0.0, high)
    logp = -softplus_exact(others - z_target)
    lse = torch.where(total > 0, others + softplus_exact(z_target - others), z_target)
    rest = -torch.expm1(logp)  # 1 - p_target
    entropy = u = v = None
    if want_entropy or want_v:
        # H = binary entropy of {target, others} + (1 - p_target) * H(others)
        log_rest = -softplus_exact(z_target - others)
        within = torch.where(total > 0, total.log() - first / total, 0.0)
        entropy = torch.where(rest > 0, rest * (within - log_rest), 0.0) - logp.exp() * logp
    if acc is not None:
        target_w = weight[target].to(dtype) * slope_target[:, None]
        scale = torch.where(total > 0, total, 1.0)[:, None]
        mean_w = acc / scale
        if want_u:
            u = (target_w - mean_w).mul_((rest * head.slope)[:, None])
        if want_v and acc_first is not None and entropy is not None:
            # dH/dz_j = -p_j (log p_j + H), summed over the target and the others apart
            p_target = logp.exp()
            level = (torch.where(high.isinf(), 0.0, high) - z_target + logp + entropy)[:, None]
            v = -(p_target * (logp + entropy))[:, None] * target_w
            v -= rest[:, None] * (acc_first / scale + level * mean_w)
            v *= head.slope
    return VocabPass(logp, lse, entropy, u, v)
