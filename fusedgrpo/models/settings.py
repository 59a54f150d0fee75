"""A model's configuration, without its weights: where it is, how it is read, what it limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fusedgrpo.config.from_pretrained import PLACES, READING
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError, FusedGRPOError, ModelError, brief, did_you_mean, reason
from fusedgrpo.models.adapters.attached import only_gguf, unwrapped
from fusedgrpo.models.adapters.files import base_of, find_adapter
from fusedgrpo.models.head import vocabulary_size
from fusedgrpo.models.kinds import auto_class


def source_of(config: GRPOConfig) -> tuple[str, dict[str, Any]]:
    """Where model and tokenizer are, and what from_pretrained must be told to find them.

    ``model_name_or_path`` may be a ``.gguf`` file itself, or an adapter on top of the model.
    """
    model, revision = base_of(config)
    name = os.path.expanduser(model)
    arguments: dict[str, Any] = {}
    path = Path(name)
    if config.gguf_file:
        arguments["gguf_file"] = config.gguf_file
    elif path.suffix == ".gguf" and os.path.isfile(path):
        name, arguments["gguf_file"] = str(path.parent), path.name
    elif file := only_gguf(name):
        arguments["gguf_file"] = file
    if revision:
        arguments["revision"] = revision
    return name, arguments


def model_settings(config: GRPOConfig) -> Any:
    """The transformers configuration of the model that ``config`` names, without its weights; None
    for a GGUF file, whose configuration is only known when it was read. Raises ModelError."""
    from transformers import AutoConfig

    source, arguments = source_of(config)
    if "gguf_file" in arguments:
        return None
    try:
        settings, unknown = AutoConfig.from_pretrained(
            source,
            trust_remote_code=config.trust_remote_code,
            return_unused_kwargs=True,
            **remaining(config) | arguments,
        )
    except Exception as error:  # as for tokenizers
        raise no_model(config, source, error) from error
    for name in unknown.keys() & remaining(config).keys() - {*PLACES, *READING}:
        known = [*PLACES, *READING, *vars(settings)]
        raise ConfigError(
            f"model_init_kwargs.{name}: neither from_pretrained nor {type(settings).__name__} "
            f"knows it.{did_you_mean(name, known)}"
        )
    auto_class(settings, source)
    return settings


def remaining(config: GRPOConfig) -> dict[str, Any]:
    """The part of ``model_init_kwargs`` that is no option of ours."""
    return dict(config.model_init_kwargs or {})


def no_model(config: GRPOConfig, source: str, error: Exception) -> FusedGRPOError:
    if config.model_init_kwargs and isinstance(error, (TypeError, AttributeError)):
        names = ", ".join(config.model_init_kwargs)
        return ConfigError(f"model_init_kwargs ({names}): {reason(error)}")
    adapter = find_adapter(config)
    if adapter is not None and adapter.base == source:
        return ModelError(
            f"The adapter {adapter.name!r} belongs to the model {source!r}, which could not be "
            f"loaded: {reason(error)} If it is elsewhere, give that as model_name_or_path and the "
            "adapter as adapter_name_or_path."
        )
    return ModelError(f"No model could be loaded from {source!r}: {reason(error)}")


def model_limits(config: GRPOConfig, model: Any = None) -> dict[str, int | None] | None:
    """``vocab_size`` and ``context_length``, without loading weights; None where ``model_settings``
    has none. Raises ModelError."""
    if model is None:
        settings = model_settings(config)
        if settings is None:
            return None
    else:
        settings = model.config
    text = settings.get_text_config()
    size = getattr(text, "vocab_size", None) if model is None else vocabulary_size(unwrapped(model))
    adapter = find_adapter(config) if model is None else None
    limits = {
        "vocab_size": (adapter and adapter.vocabulary()) or size,
        "context_length": getattr(text, "max_position_embeddings", None),
    }
    for name, value in limits.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ModelError(
                f"config.json of {config.model_name_or_path!r}: the {name} is {brief(value)}, "
                "expected an integer >= 1."
            )
    return limits
