"""4-bit layers of bitsandbytes, kept in the layout that has a backward pass; and their weights."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from fusedgrpo.errors import ModelError


def keep_differentiable(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model that trains, or is compared with one that does, as loaded.

    On a CPU with bfloat16 instructions bitsandbytes repacks such a layer in its first forward pass
    without gradients, for a product that has no backward pass: in training, nothing below it would
    get a gradient through it. With the repacking its scales are rounded to bfloat16, so it is
    another model from then on. Raises ModelError for one that was repacked before.
    """
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:  # then nobody has made such a layer
        return
    for name, layer in model.named_modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):
            continue
        for state in (getattr(layer.weight, "quant_state", None), layer.quant_state):
            if getattr(state, "packing_format_for_cpu", False):
                raise ModelError(
                    f"{name}: bitsandbytes has repacked this 4-bit layer for inference on a CPU, "
                    "which rounds its scales and leaves it without a backward pass. Load the model "
                    "anew, and hand it over before it generates or scores anything."
                )
        layer.support_avx512bf16_for_cpu = False


def is_dense(layer: nn.Module) -> bool:
    """Whether ``dense_weight`` knows the weight that ``layer`` multiplies with."""
    if type(layer) is nn.Linear or hasattr(layer, "dequantised"):
        return True
    state = getattr(layer.weight, "quant_state", None)
    if state is None or not _is_four_bit(layer):
        return False
    return tuple(state.shape) == (layer.out_features, layer.in_features)


def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` in ``dtype``: what ``layer``, a linear one, multiplies with; of 4 bits a copy,
    as bitsandbytes' own backward pass makes it."""
    if hasattr(layer, "dequantised"):  # a stand-in (engine/memory/fake_layers.py)
        stood_for: Tensor = layer.dequantised(dtype)
        return stood_for
    weight = layer.weight.detach()
    state = getattr(layer.weight, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.view(-1, 1), state)
    return weight.to(dtype)


def compute_dtype(layer: Any) -> torch.dtype | None:
    """The dtype that ``layer``, in 4 bits, casts its input to; None: it leaves it as it is."""
    found: torch.dtype | None = getattr(layer, "compute_dtype", None)
    return found


def _is_four_bit(layer: nn.Module) -> bool:
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and type(layer) is bitsandbytes.nn.Linear4bit
