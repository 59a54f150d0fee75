"""Which models can be trained: causal LMs of transformers. Others are refused by name."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from fusedgrpo.errors import ModelError
from fusedgrpo.models.adapters.attached import unwrapped

log = logging.getLogger("fusedgrpo")

EXPECTED = (
    "Expected a name or path, or a causal LM of transformers, with peft around it or not: "
    "AutoModelForCausalLM.from_pretrained(...)."
)


def accepted(model: Any) -> Any:
    """``model`` as it is trained: the model itself, or the one that torch.compile has wrapped.

    Raises ModelError for what is no causal LM.
    """
    from transformers import Pipeline, PreTrainedModel

    if isinstance(model, type):
        raise ModelError(f"model: {model.__name__} is a class, not a model. {EXPECTED}")
    name = type(model).__name__
    if isinstance(model, Pipeline):
        raise ModelError(f"model: a {name} is no model. Pass its model: pipeline.model.")
    if _child(model, "module") is not None and not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model: a {name} is a wrapper for several processes. Pass the model in it "
            "(model.module): the trainer shares the work between the processes itself."
        )
    compiled = _child(model, "_orig_mod")
    if compiled is not None:
        log.warning("model: torch.compile is taken off, the model itself is trained.")
        return accepted(compiled)
    causal_lm = unwrapped(model)
    if _child(causal_lm, "_orig_mod") is not None:
        raise ModelError(
            f"model: inside the {name} is a model wrapped by torch.compile. Put the adapter on the "
            "model itself."
        )
    if not isinstance(causal_lm, PreTrainedModel):
        raise ModelError(f"model: got a {type(causal_lm).__name__}. {EXPECTED}")
    _check_settings(causal_lm.config, f"model: {type(causal_lm).__name__}")
    if causal_lm.get_output_embeddings() is None:
        raise ModelError(
            f"model: {type(causal_lm).__name__} has no LM head, so it says nothing about the next "
            f"token. {EXPECTED}"
        )
    if not causal_lm.can_generate():
        raise ModelError(
            f"model: {type(causal_lm).__name__} cannot generate, so it is no causal LM. {EXPECTED}"
        )
    return model


def auto_class(settings: Any, source: str) -> Any:
    """The class of transformers that loads a causal LM, or a multimodal one that is used for text.

    settings: the model's configuration. Raises ModelError where there is none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    what = f"{source!r} ({type(settings).__name__.removesuffix('Config')})"
    _check_settings(settings, what)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        own_code = getattr(settings, "auto_map", None) or {}
        if type(settings) in auto._model_mapping or auto.__name__ in own_code:
            return auto
    raise ModelError(
        f"{what} is no causal language model: transformers has none of its kind. Give one that "
        "AutoModelForCausalLM can load."
    )


def _child(model: Any, name: str) -> Any:
    """A module's own child: wrappers answer for what they wrap when asked for an attribute."""
    return model._modules.get(name) if isinstance(model, nn.Module) else None


def _check_settings(settings: Any, what: str) -> None:
    if getattr(settings, "is_encoder_decoder", False):
        raise ModelError(
            f"{what} is an encoder-decoder, which cannot be trained here: a prompt and its "
            "completion are one sequence. Give a decoder-only model, one that "
            "AutoModelForCausalLM loads."
        )


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a model in eval mode in which a token changes what was said before it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] * 7 % min(vocabulary, 97)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 11) % min(vocabulary, 97)
    states = [
        model.get_decoder()(input_ids=x, use_cache=False).last_hidden_state[:, :5].double()
        for x in (ids, other)
    ]
    change = float((states[0] - states[1]).norm() / states[0].norm().clamp(min=1e-30))
    exact = model.get_input_embeddings().weight.dtype == torch.float32
    if change > (1e-3 if exact else 5e-2):
        raise ModelError(
            f"{type(model).__name__} is no causal LM: its tokens see those after them, as in "
            f"masked language models and encoders. {EXPECTED}"
        )
