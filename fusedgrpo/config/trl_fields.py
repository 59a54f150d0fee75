"""Fields of ``trl.GRPOConfig`` that are no options here, for the parsers that read dataclasses.

Without them ``TrlParser`` calls such an option unknown on a command line, and drops it from its
YAML file where the script asks for that, as TRL's own does. With them it is what it is in a call of
``GRPOConfig``: taken, or refused by name. ``--help`` does not show them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.yaml_file import parse_override

# A test compares them with trl's.
NAMES = (
    "activation_checkpointing", "activation_checkpointing_kwargs", "auto_find_batch_size",
    "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval",
    "cache_implementation", "cast_lm_head_to_fp32", "dataloader_drop_last",
    "dataloader_in_order", "dataloader_multiprocessing_context",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
    "ddp_static_graph", "ddp_timeout", "debug", "deepspeed", "do_eval", "do_predict",
    "ds3_gather_for_generation", "enable_jit_checkpoint", "eval_accumulation_steps",
    "eval_delay", "eval_do_concat_batches", "eval_use_gather_object", "fp16_full_eval", "fsdp",
    "fsdp_config", "gradient_checkpointing_kwargs", "hub_always_push", "ignore_data_skip",
    "include_for_metrics", "include_num_input_tokens_seen", "label_names",
    "label_smoothing_factor", "length_column_name", "local_rank",
    "log_completions_hub_repo", "log_level", "log_level_replica", "log_multimodal",
    "log_on_each_node", "log_unique_prompts", "logging_nan_inf_filter",
    "neftune_noise_alpha", "optim_target_modules",
    "pad_to_multiple_of", "parallelism_config", "prediction_loss_only", "remove_unused_columns",
    "restore_callback_states_from_checkpoint", "save_on_each_node", "skip_memory_metrics",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps",
    "trackio_bucket_id", "trackio_static_space_id", "train_sampling_strategy",
    "transformers_continuous_batching_config", "use_cache",
    "use_transformers_continuous_batching", "use_transformers_paged", "use_vllm",
    "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_group_port",
    "vllm_importance_sampling_cap", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_max_model_length", "vllm_mode", "vllm_model_impl",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_structured_outputs_regex", "vllm_tensor_parallel_size",
)  # fmt: skip


# Of those, the other name of an option.
_OTHER_NAMES = {name: ALIASES[name].option for name in NAMES if name in ALIASES}


class LeftOut:
    """In place of a value that nobody has given."""

    def __repr__(self) -> str:
        return "left out"


class Typed:
    """The type of such a field for argparse: text as on a command line becomes the value that it
    stands for."""

    def __new__(cls, text: str) -> Any:
        return parse_override(text, takes_text=False)


LEFT_OUT = LeftOut()
TYPES = {name: str if name in ALIASES and ALIASES[name].verbatim else Typed for name in NAMES}


def trl_fields() -> dict[str, dataclasses.Field[Any]]:
    """The fields, by name."""
    # An option without a value is a true one. ``help`` is argparse's mark of one that it hides.
    shown = {"help": argparse.SUPPRESS, "nargs": "?", "const": True}
    holder = dataclasses.make_dataclass(
        "Holder",
        [
            (name, kind, dataclasses.field(default=LEFT_OUT, metadata=shown, compare=False))
            for name, kind in TYPES.items()
        ],
        kw_only=True,
    )
    return {spec.name: spec for spec in dataclasses.fields(holder)}


def as_called(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``GRPOConfig`` without those that a parser has filled in for these fields,
    and without the default of an option whose other name was given."""
    asked = {name: value for name, value in given.items() if value is not LEFT_OUT}
    if len(asked) < len(given):
        for other, name in _OTHER_NAMES.items():
            if other in asked and asked.get(name) == defaults[name]:
                del asked[name]
    return asked
