"""``model_init_kwargs``: the arguments of ``from_pretrained``, many of which are options here.

Those become the option. Of the rest, what says where the files are and how they are read goes to
transformers, and what this trainer decides itself is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fusedgrpo.config.foreign import Refused

OPTIONS = {
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "attn_implementation": "attn_implementation",
    "revision": "model_revision",
    "trust_remote_code": "trust_remote_code",
    "gguf_file": "gguf_file",
    "load_in_4bit": "load_in_4bit",
}

# Where files come from: for the model, its configuration and its tokenizer alike.
PLACES = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# How a model is read. Names that from_pretrained does not know go to the model's configuration.
READING = (
    "subfolder", "code_revision", "variant", "use_safetensors", "key_mapping", "use_kernels",
    "experts_implementation", "quantization_config", "device_map", "weights_only",
)  # fmt: skip

_ONE_DEVICE = (
    "the whole model is on the device of its process; load_in_4bit, gradient_checkpointing and "
    "activation_offloading save memory"
)
_GIVE_THE_MODEL = "load the model yourself and give it as `model`"

_SPREADING = (
    "max_memory", "offload_folder", "offload_state_dict", "offload_buffers", "tp_plan", "tp_size",
    "device_mesh", "distributed_config",
)  # fmt: skip
_REFUSED = {
    **dict.fromkeys(_SPREADING, Refused(_ONE_DEVICE, (False,))),
    "low_cpu_mem_usage": Refused("weights are always loaded that way; leave it out", (True,)),
    # The update never has a cache, and sampling always.
    "use_cache": Refused("expected true or false", (True, False)),
    "load_in_8bit": Refused("only 4 bits can be trained: load_in_4bit: true", (False,)),
    "output_loading_info": Refused("what was loaded is checked here; leave it out", (False,)),
    "ignore_mismatched_sizes": Refused("weights of another shape would be random", (False,)),
    "from_tf": Refused("convert the weights to safetensors first", (False,)),
    "from_flax": Refused("convert the weights to safetensors first", (False,)),
    "config": Refused(_GIVE_THE_MODEL),
    "state_dict": Refused(_GIVE_THE_MODEL),
    "generation_config": Refused("sampling is set by temperature, top_p, top_k, min_p"),
    "return_unused_kwargs": Refused("leave it out", (False,)),
}

# BitsAndBytesConfig: settings that are options here, with their defaults there, and the only value
# of settings that are none.
_FOUR_BIT = {
    "bnb_4bit_quant_type": ("bnb_4bit_quant_type", "fp4"),
    "bnb_4bit_use_double_quant": ("use_bnb_nested_quant", False),
}
_FOUR_BIT_DEFAULTS = {
    "quant_method": "bitsandbytes", "load_in_8bit": False, "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None, "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


class Settled(NamedTuple):
    """options: ``(argument, option, value)``. arguments: passed on to transformers. problems:
    ``(argument, message)``."""

    options: list[tuple[str, str, Any]]
    arguments: dict[str, Any]
    problems: list[tuple[str, str]]


def settle(given: Mapping[str, Any]) -> Settled:
    """Sort ``model_init_kwargs``."""
    settled = Settled([], {}, [])
    for name, value in given.items():
        label = f"model_init_kwargs.{name}"
        try:
            if name in OPTIONS:
                if value is not None:
                    settled.options.append((label, OPTIONS[name], value))
            elif name == "quantization_config":
                settled.options.extend(_quantization(label, value, settled.arguments))
            elif name == "device_map":
                if value is not None:
                    settled.arguments[name] = _device_map(value)
            elif name not in _REFUSED:
                settled.arguments[name] = value
            elif not _REFUSED[name].accepts(value):
                raise ValueError(f"not supported: {_REFUSED[name].remedy}.")
        except ValueError as error:
            settled.problems.append((label, str(error)))
    return settled


def _device_map(value: Any) -> dict[str, Any]:
    """Everything on one device; whether it is ours is seen when the model is loaded."""
    if isinstance(value, Mapping) and list(value) == [""]:
        return dict(value)
    raise ValueError(f"not supported: {_ONE_DEVICE}; use_cpu: true stays on the CPU. Leave it out.")


def _quantization(
    label: str, value: Any, arguments: dict[str, Any]
) -> Iterator[tuple[str, str, Any]]:
    if value is None:
        return
    if getattr(value, "dequantize", False):  # MXFP4 and the like: stored so, trained in 16 bit
        arguments["quantization_config"] = value
        return
    settings = value if isinstance(value, Mapping) else _settings(value)
    if settings is None or settings.get("load_in_4bit") is not True:
        raise ValueError(
            f"not supported: {type(value).__name__}. load_in_4bit: true is what can be trained; "
            "weights that are stored quantised say so themselves. Or " + _GIVE_THE_MODEL + "."
        )
    yield label, "load_in_4bit", True
    for name, (option, default) in _FOUR_BIT.items():
        yield f"{label}.{name}", option, settings.get(name, default)
    computes = _word(settings.get("bnb_4bit_compute_dtype"))
    if computes in ("bfloat16", "float16"):
        yield f"{label}.bnb_4bit_compute_dtype", {"b": "bf16", "f": "fp16"}[computes[0]], True
    understood = {*_FOUR_BIT, "load_in_4bit", "bnb_4bit_compute_dtype"}
    for name, setting in settings.items():
        if str(name).startswith("_") or name in understood:
            continue
        if name not in _FOUR_BIT_DEFAULTS or _word(setting) != _FOUR_BIT_DEFAULTS[name]:
            raise ValueError(f"{name}={setting!r} is not supported; leave it out.")


def _word(value: Any) -> Any:
    """A dtype or an enumeration's member by its name."""
    value = getattr(value, "value", value)
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value


def _settings(value: Any) -> dict[str, Any] | None:
    return value.to_dict() if hasattr(value, "to_dict") else None
