"""Other trainers' names for options of :class:`~fusedgrpo.config.schema.GRPOConfig`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fusedgrpo.errors import brief


class Alias(NamedTuple):
    """Another name of ``option``. ``convert`` maps the value; it raises ValueError on a bad one.
    verbatim: what is typed for it on a command line is text, whatever it looks like."""

    option: str
    convert: Callable[[Any], Any] | None = None
    verbatim: bool = False


def _truth(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {brief(value)}")
    return value


def _negate(value: Any) -> bool:
    return not _truth(value)


def _quantization_bit(value: Any) -> bool:
    if value is None:
        return False
    if not (type(value) in (int, str) and value in (4, "4")):
        raise ValueError(
            f"only 4 bits (NF4 or FP4 through bitsandbytes) can be trained: {brief(value)}"
        )
    return True


def _use_peft(value: Any) -> str:
    return "lora" if _truth(value) else "full"


def _enable_thinking(value: Any) -> dict[str, bool]:
    return {"enable_thinking": _truth(value)}


def _warmup_ratio(value: Any) -> Any:
    try:
        share = float(value)
    except (TypeError, ValueError, OverflowError):
        share = -1.0
    if isinstance(value, bool) or not 0 <= share < 1:
        raise ValueError(f"expected a share of the run >= 0 and < 1, got {brief(value)}")
    return share


def _max_resample_times(value: Any) -> Any:
    if type(value) is not int or value < 1:
        raise ValueError(f"expected a whole number >= 1, got {brief(value)}")
    return value + 1  # the first sampling is none of them


def _regex(value: Any) -> Any:
    return None if value is None else {"regex": value}


_ATTENTION = {
    "auto": None,
    "disabled": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
}


def _flash_attn(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or value not in _ATTENTION:
        raise ValueError(f"expected one of {', '.join(_ATTENTION)}, got {brief(value)}")
    return _ATTENTION[value]


ALIASES: dict[str, Alias] = {
    # LLaMA-Factory
    "pref_beta": Alias("beta"),
    "lora_rank": Alias("lora_r"),
    "lora_target": Alias("lora_target_modules"),
    "cutoff_len": Alias("max_length"),
    "max_new_tokens": Alias("max_completion_length"),
    "default_system": Alias("system_prompt"),
    "quantization_bit": Alias("load_in_4bit", _quantization_bit),
    "quantization_type": Alias("bnb_4bit_quant_type"),
    "double_quantization": Alias("use_bnb_nested_quant"),
    "flash_attn": Alias("attn_implementation", _flash_attn),
    "moe_aux_loss_coef": Alias("router_aux_loss_coef"),
    "enable_thinking": Alias("chat_template_kwargs", _enable_thinking),
    "enable_liger_kernel": Alias("use_liger_kernel"),
    "disable_gradient_checkpointing": Alias("gradient_checkpointing", _negate),
    "disable_shuffling": Alias("shuffle_dataset", _negate),
    # TRL and transformers, with the spellings of their earlier releases
    "use_peft": Alias("finetuning_type", _use_peft),
    "dataset_name": Alias("dataset"),
    "train_dataset": Alias("dataset"),
    "tokenizer_name": Alias("tokenizer_name_or_path"),
    "torch_dtype": Alias("dtype"),
    "bnb_4bit_use_double_quant": Alias("use_bnb_nested_quant"),
    "activation_checkpointing": Alias("gradient_checkpointing"),
    "warmup_ratio": Alias("warmup_steps", _warmup_ratio),
    "no_cuda": Alias("use_cpu"),
    "lr_scheduler": Alias("lr_scheduler_type"),
    "evaluation_strategy": Alias("eval_strategy"),
    # ms-swift
    "dynamic_sample": Alias("dynamic_sampling"),
    "max_resample_times": Alias("max_sampling_rounds", _max_resample_times),
    "vllm_structured_outputs_regex": Alias("structured_outputs", _regex, verbatim=True),
}
