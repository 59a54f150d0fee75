"""Models and tokenizers small enough to build in milliseconds, for tests of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB = 40
EOS, PAD, BOS = 1, 2, 3

_SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}

# Every family has something of its own between embedding and softmax.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"tie_word_embeddings": True},
    "Llama": {"tie_word_embeddings": False},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "Gemma3": {"head_dim": 8, "sliding_window": 4, "layer_types": None},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Phi3": {},
    "Mistral": {"sliding_window": 4},
    "Qwen3": {"head_dim": 8},
    "SmolLM3": {},
}


def model(family: str = "Qwen2", *, seed: int = 0, scale: float = 12.0, **config: Any) -> Any:
    """A tiny random causal LM in float32 and eval mode.

    scale: the weights of matrices are multiplied by it, so that distributions are not near uniform.
    """
    import transformers

    values = {**_SIZE, **FAMILIES[family], **config}
    if family == "Gemma3":
        layers = values["num_hidden_layers"]
        values["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        made = transformers.Gemma3TextConfig(**values)
    else:
        made = getattr(transformers, f"{family}Config")(**values)
    torch.manual_seed(seed)
    built = getattr(transformers, f"{family}ForCausalLM")(made).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.02 * scale)
    return built


# Mixtures of experts, by what their configurations need besides.
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "Glm4Moe": {  # has a router, but no coefficient and no loss of its own
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
}


def mixture(family: str = "Mixtral", *, seed: int = 0, **config: Any) -> Any:
    """A tiny random mixture of experts in float32 and eval mode, its experts not in balance."""
    import transformers

    made = getattr(transformers, f"{family}Config")(
        **{**_SIZE, "initializer_range": 0.1, **MIXTURES[family], **config}
    )
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(made).eval()


def tokenizer(*, pad: str | None = "<pad>", vocab: int = VOCAB, template: bool = False) -> Any:
    """One token per word: ``<unk> <eos> <pad> <bos> w4 w5 ...``."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<pad>", "<bos>", *(f"w{i}" for i in range(4, vocab))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token=pad,
    )
    if template:
        made.chat_template = (
            "{% for m in messages %}<bos> {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}<bos>{% endif %}"
        )
    return made


def save(directory: Path, built: nn.Module | None = None, **tokenizer_options: Any) -> Path:
    """A model directory as ``from_pretrained`` reads it."""
    saved: Any = model() if built is None else built
    saved.save_pretrained(directory)
    tokenizer(**tokenizer_options).save_pretrained(directory)
    return directory


def add_lora(built: nn.Module, **options: Any) -> Any:
    """``built`` under an adapter that does something (its B matrices are not zero)."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        built, LoraConfig(**{"target_modules": "all-linear", "r": 2} | options)
    )
    stir(wrapped)
    return wrapped


def stir(built: nn.Module, size: float = 0.1) -> None:
    """Change every trainable parameter, as training would."""
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
