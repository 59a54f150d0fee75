"""Tiny models whose layers remember something else than keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import BOS, EOS, PAD, VOCAB

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_SIZE: dict[str, Any] = _TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_DELTA: dict[str, Any] = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
_STATE: dict[str, Any] = _TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}

# Class of the model, class of its configuration, and what the latter is given.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3.5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _SIZE | _DELTA),
    "Qwen3-Next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", _SIZE | _DELTA | _EXPERTS),
    "Olmo-Hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", _SIZE | _DELTA),
    "LFM2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        _SIZE | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    ),
    "Granite-4-H": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        _SIZE
        | _MAMBA
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 16,
        },
    ),
    "Bamba": ("BambaForCausalLM", "BambaConfig", _SIZE | _MAMBA | {"attn_layer_indices": [1]}),
    "Falcon-H1": ("FalconH1ForCausalLM", "FalconH1Config", _SIZE | _MAMBA | {"mamba_d_ssm": 32}),
    "Nemotron-H": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {name: value for name, value in _SIZE.items() if name != "num_hidden_layers"}
        | {
            "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 4,
            "n_groups": 1,
            "chunk_size": 4,
            "head_dim": 8,
        },
    ),
    "Jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        _SIZE
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "Zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        _SIZE
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "mamba_d_state": 4,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "mamba_headdim": 8,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
    ),
    "RecurrentGemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        _SIZE | {"num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4},
    ),
    "MiniMax": (
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        _SIZE
        | {
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "block_size": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Mamba": ("MambaForCausalLM", "MambaConfig", _STATE),
    "Falcon-Mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", _STATE),
    "Mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        _STATE | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    ),
    "RWKV": (
        "RwkvForCausalLM",
        "RwkvConfig",
        _TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    ),
    "xLSTM": (
        "xLSTMForCausalLM",
        "xLSTMConfig",
        _TOKENS
        | {
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "qk_dim_factor": 1.0,
            "chunk_size": 8,
        },
    ),
}


def model(family: str, *, seed: int = 0, size: float = 0.2, **config: Any) -> Any:
    """One of ``FAMILIES``, random, in float32 and eval mode."""
    import transformers

    name, config_name, values = FAMILIES[family]
    build: Callable[..., Any] = getattr(transformers, name)
    torch.manual_seed(seed)
    built = build(getattr(transformers, config_name)(**values | config)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() == 2 and "conv" not in name:
                parameter.normal_(0, size)
    return built
