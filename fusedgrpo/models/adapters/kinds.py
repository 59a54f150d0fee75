"""Kinds of adapters that a forward pass of the model's own modules does not see."""

from __future__ import annotations

from typing import Any

# What a PeftModel does around the model's forward, by its kind.
_AROUND = {
    "XLORA": "mixes its adapters by a forward pass of its own",
    "POLY": "needs the number of a task with every batch",
    "ADAPTION_PROMPT": "puts a learned prompt into the attention",
}


def acts_outside(settings: Any) -> str | None:
    """The effect that such adapters have outside the modules that they are in; None for none.

    Log-probs come from the model's decoder and head, which peft's wrapper does not know of.
    """
    name = type(settings).__name__
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    if settings.is_prompt_learning:
        return f"{name} learns a prompt, which is not in the model"
    if kind in _AROUND:
        return f"{name} {_AROUND[kind]}"
    if getattr(settings, "alora_invocation_tokens", None):
        return f"{name} with alora_invocation_tokens acts only after these tokens"
    return None
