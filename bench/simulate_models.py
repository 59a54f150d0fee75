"""The models of ``simulate.py``: published configurations, with fake or random weights."""

from __future__ import annotations

from typing import Any

import torch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.models import loading

# config.json of each, as published.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "qwen2.5-14b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120,
        "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    },
    "llama-3.2-3b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    },
}  # fmt: skip


def model_config(name: str, **changes: Any) -> Any:
    """The transformers configuration of a model in ``MODELS``."""
    from transformers import AutoConfig

    values = MODELS[name] | changes
    return AutoConfig.for_model(**values)


def skeleton(config: GRPOConfig, settings: Any) -> Any:
    """The model that ``load_model`` makes of ``settings``, on the meta device; in 4 bits through
    transformers' own replacement of layers."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    dtype = loading.weights_dtype(config, torch.device("cuda"))
    if dtype == "auto":
        dtype = settings.get_text_config().dtype
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=config.attn_implementation or "sdpa"
        )
    if config.load_in_4bit:
        quantization = loading._four_bit(config, torch.device("cuda"))
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
        model.is_loaded_in_4bit = True
    return model


def fill(model: Any, labelled: Any, device: str = "cpu") -> None:
    """Weights for a skeleton, fake or random; those of 4-bit layers quantised by bitsandbytes.

    labelled: a function of the kind of weight that gives a context.
    """
    import bitsandbytes as bnb

    model.hf_device_map = {"": device}  # it is where it belongs
    done: dict[int, Any] = {}  # tied weights are one
    head = model.get_output_embeddings()
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in done:
                kind = "weights, norms and biases"
                if isinstance(old, bnb.nn.Params4bit):
                    kind = "weights, 4 bit"
                elif module is head or isinstance(module, torch.nn.Embedding):
                    kind = "weights, embeddings and head"
                with labelled(kind):
                    done[id(old)] = _filled(old, device)
            setattr(module, name, done[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            with labelled("weights, norms and biases"):
                new = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
                module.register_buffer(name, new, persistent=False)
        if isinstance(module, bnb.nn.Linear4bit):
            module.quant_state = module.weight.quant_state  # type: ignore[attr-defined]


def _filled(old: Any, device: str) -> torch.nn.Parameter:
    import bitsandbytes as bnb

    if not isinstance(old, bnb.nn.Params4bit):
        new = torch.empty(old.shape, dtype=old.dtype, device=device).normal_(std=0.02)
        return torch.nn.Parameter(new, requires_grad=old.requires_grad)
    packed, state = bnb.functional.quantize_4bit(
        torch.empty(old.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02),
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
    )
    # Params4bit cannot hold a fake tensor; a plain parameter that knows the same does.
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(weight, name, getattr(old, name))
    weight.bnb_quantized, weight.quant_state = True, state
    return weight
