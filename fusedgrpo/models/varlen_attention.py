"""The kernel for attention over ragged sequences on a GPU: flash-attn's where it is installed, else
torch's; and what its memory depends on.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgrpo import host

log = logging.getLogger("fusedgrpo")


@functools.cache
def varlen_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool
) -> Callable[..., Tensor] | None:
    """One kernel for ragged queries and keys, ``[T, h, d]`` each; None where there is none."""
    if dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return None
    capability = host.gpu_capability(device)
    if capability is not None and capability < (8, 0):
        return None
    if _has_flash_attn():
        return _flash_attn
    if softcap or not _varlen_parameters():
        return None
    return _torch_varlen


@functools.cache
def _has_flash_attn() -> bool:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        if importlib.util.find_spec("flash_attn") is not None:
            log.warning("flash-attn is installed but cannot be used: %s", error)
        return False
    return True


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
        deterministic=True,
    )


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn
    known = _varlen_parameters()
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = scaling
    else:
        q = q * (scaling * q.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or window >= max_k:
        options["is_causal"] = True
    else:
        raise RuntimeError(
            f"torch {host.package_version('torch')} has no sliding window in varlen_attn: install "
            "flash-attn, or set shared_prompt: off and attn_implementation: sdpa."
        )
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **options)


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """The names that torch's kernel takes; none where torch has no such kernel."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return frozenset()
    from torch.nn.attention import varlen

    return frozenset(inspect.signature(varlen.varlen_attn).parameters)


class VarlenTraits(NamedTuple):
    """A kernel of ragged attention on a GPU, by what its memory depends on.

    repeats_heads: keys and values are repeated for the heads that share them, and kept like that.
    sums_in_parts: the gradient of the queries is summed in parts, so that it is the same bits each
    time.
    """

    repeats_heads: bool
    sums_in_parts: bool


def varlen_traits(full_determinism: bool) -> VarlenTraits:
    """The traits of the kernel that this installation would use. torch's own is deterministic only
    where all of torch is; flash-attn is always asked to be."""
    if _has_flash_attn():
        return VarlenTraits(repeats_heads=False, sums_in_parts=True)
    grouped = "enable_gqa" in _varlen_parameters()
    return VarlenTraits(repeats_heads=not grouped, sums_in_parts=full_determinism)
