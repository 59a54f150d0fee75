"""The LM head of a transformers model as the log-prob operation takes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedgrpo.errors import ModelError


class Head(NamedTuple):
    """``logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)``."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None


def find_head(model: Any) -> Head:
    """The head of a causal LM, looked up anew at every call (wrappers replace modules).

    Raises ModelError for a head that is no plain dense linear layer: with a low-rank adapter on it,
    or quantised, the log-probs of its weight alone would be silently wrong.
    """
    config = model.config.get_text_config()
    layer = head_layer(model)
    # Where single tokens are trained, peft's wrapper has their rows put into the weight, anew at
    # every call and with their gradient.
    weight = model.get_output_embeddings().weight
    matrix = isinstance(layer, nn.Linear) and len(_shape(weight)) == 2
    if not matrix or not weight.is_floating_point():
        raise ModelError(
            f"The LM head is a {type(layer).__name__} with a {weight.dtype} weight: expected a "
            "linear layer in floating point. Exclude it from quantisation."
        )
    settings = vars(config)
    return Head(weight, layer.bias, _logit_scale(settings), _softcap(settings))


def logits(head: Head, hidden: Tensor) -> Tensor:
    """``[..., V]`` of ``hidden [..., H]``, as the log-prob operation computes them."""
    scores = nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    scores = scores * head.logit_scale
    return scores if head.softcap is None else head.softcap * torch.tanh(scores / head.softcap)


def _softcap(settings: dict[str, Any]) -> float | None:
    """Gemma, RecurrentGemma and xLSTM each have a name for it."""
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def head_layer(model: Any) -> Any:
    """The linear layer that is the head now: of peft's copies the one that acts. Raises
    ModelError."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings: expected a causal LM.")
    if hasattr(layer, "modules_to_save"):
        acts = [n for n in layer.active_adapters if n in layer.modules_to_save]
        off = layer.disable_adapters or not acts
        layer = layer.original_module if off else layer.modules_to_save[acts[0]]
    elif hasattr(layer, "token_adapter"):
        layer = layer.token_adapter.base_layer
    if hasattr(layer, "base_layer"):
        raise ModelError(
            "The LM head carries a low-rank adapter, which is not supported: leave lm_head out of "
            "the target modules ('all-linear' does), or train it whole with modules_to_save of a "
            "peft_config. A trained adapter can be merged first (merge_and_unload)."
        )
    return layer


def _logit_scale(settings: dict[str, Any]) -> float:
    """Some families multiply their logits (Cohere, Falcon-H1), some divide them (Granite)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if settings.get(name) is not None:
            return float(settings[name])
    scaling = settings.get("logits_scaling")
    if scaling is None:
        return 1.0
    return float(scaling) if settings.get("model_type") == "hyperclovax" else 1 / float(scaling)


def vocabulary_size(model: Any) -> int:
    """V: how many token ids the model can both read and score."""
    embeddings = model.get_input_embeddings()
    if hasattr(embeddings, "token_adapter"):  # its own weight would be put together to be measured
        embeddings = embeddings.token_adapter.base_layer
    return int(min(_shape(layer.weight)[0] for layer in (embeddings, head_layer(model))))


def _shape(weight: Tensor) -> torch.Size:
    """ZeRO-3 leaves an empty tensor in place outside the forward of the module that owns it."""
    return getattr(weight, "ds_shape", weight.shape)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare our reading of the head with the model's own logits on a few tokens.

    A family that does something else between head and softmax would otherwise train on wrong
    log-probs without a word. The model must be in eval mode. Raises ModelError.
    """
    head = find_head(model)
    # Several ids: the embedding of a padding token is often zero, and so would its logits be.
    ids = torch.arange(min(8, vocabulary_size(model)), device=head.weight.device)[None]
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = logits(head, hidden)
    error = float((own - ours).abs().max() / own.abs().max().clamp(min=1e-6))
    if not error < 0.02:
        raise ModelError(
            f"{type(model).__name__} does something between its LM head and its logits that "
            f"fusedgrpo does not know (relative difference {error:.2g}). It cannot be trained here."
        )
