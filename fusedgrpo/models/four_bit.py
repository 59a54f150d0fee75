"""4-bit layers of bitsandbytes, kept in the layout that has a backward pass."""

from __future__ import annotations

import sys

from torch import nn

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
