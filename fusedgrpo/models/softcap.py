"""Models whose attention caps its scores, under implementations of transformers that do not."""

from __future__ import annotations

from torch import nn


def keep_softcap(model: nn.Module) -> None:
    """Give a model that caps its attention's scores (Gemma 2) the spelled-out attention where it
    has SDPA, which cannot cap: some releases of transformers (5.17) then leave the cap out without
    a word, in generation and in padded forward passes, and others (5.23) refuse."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "attn_logit_softcapping", None) is None:
            continue
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation_internal = "eager"  # type: ignore[union-attr]
