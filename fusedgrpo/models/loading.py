"""From a configuration to a model that trains: dtype, 4 bits, GGUF, adapter, checkpointing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from fusedgrpo import host, stages
from fusedgrpo.errors import ConfigError, ModelError
from fusedgrpo.models import liger_layers, loading_bars
from fusedgrpo.models.adapters.attached import has_adapters, unwrapped
from fusedgrpo.models.adapters.checks import prepare
from fusedgrpo.models.adapters.files import check_options, find_adapter, put_onto
from fusedgrpo.models.adapters.lora import add_lora, check_kind
from fusedgrpo.models.at_rest import at_rest_after, say_what_is_cast, store_in_float16
from fusedgrpo.models.device import pick_compute_dtype, resting_dtype, stored_dtype
from fusedgrpo.models.dropout import (
    as_it_samples,
    computes_otherwise_in_training,
    greatest,
    own_dropout,
)
from fusedgrpo.models.four_bit import keep_differentiable
from fusedgrpo.models.head import check_head, find_head
from fusedgrpo.models.kinds import auto_class, check_causal
from fusedgrpo.models.router import find_router
from fusedgrpo.models.settings import model_settings, no_model, remaining, source_of

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig
    from fusedgrpo.models.adapters.files import AdapterFiles

log = logging.getLogger("fusedgrpo")


def _check_device_map(given: dict[str, Any] | None, device: torch.device) -> None:
    """``{"": where}`` is what is done here; it must be the same place."""
    if given is None:
        return
    wanted = given[""]
    try:
        asked = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"model_init_kwargs.device_map: {wanted!r} is no device.") from error
    current = device.index if device.index is not None or device.type == "cpu" else 0
    if asked.type != device.type or asked.index not in (None, current):
        raise ConfigError(
            f"model_init_kwargs.device_map: {wanted!r}, but this run is on {device}. Leave it out; "
            "use_cpu and CUDA_VISIBLE_DEVICES choose the device."
        )


def policy_parts(
    config: GRPOConfig, model: nn.Module | None = None, peft_config: Any = None
) -> dict[str, Any]:
    """The arguments of a run's ``Policy``: ``model`` if given, else loaded by name. An adapter that
    it has, or that ``config`` names, is trained further; else one is added, unless
    ``finetuning_type`` is ``full``. Frozen linear layers that are loaded in float32 are cast to the
    dtype that autocast would cast them to (``at_rest.py``); those of a given ``model`` stay as they
    are. Raises ModelError or ConfigError.
    """
    device = host.pick_device(config.use_cpu)
    compute_dtype = pick_compute_dtype(config.bf16, config.fp16, device)
    given = model is not None
    liger_layers.check(config)
    if given:
        _say_what_a_given_model_decides(config)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, compute_dtype, enabled=compute_dtype is not None)

    if model is None:
        model = load_model(config, device)
    elif getattr(model, "hf_device_map", None) is None and not _is_quantized(model):
        model = model.to(device)
    keep_differentiable(model)  # before its first forward pass
    liger_layers.put_into(model, config)
    if compute_dtype == torch.float16 and config.finetuning_type == "lora":
        store_in_float16(model)
    model.eval()
    causal_lm = unwrapped(model)
    find_head(causal_lm)  # a tower of another kind, or a model without a head, fails here
    router = find_router(causal_lm, config.router_aux_loss_coef, autocast)
    saved = find_adapter(config) if not given or config.adapter_name_or_path else None
    keep: Literal["adapter", "model"] | None = None
    new_adapter = False
    if saved is not None or has_adapters(model):
        _refuse_beside_an_adapter(model, config, peft_config, saved)
        if saved is not None:
            model = put_onto(model, saved, config, device)
        elif not given:
            causal_lm.set_adapter(causal_lm.active_adapters()[0])  # lay among the model's files
        keep = "adapter"  # whatever it was trained to do is part of the reference
    elif config.finetuning_type == "lora":
        model = add_lora(model, config, peft_config)
        new_adapter = True
        # Only of the adapters that we make ourselves is it known that they start as nothing. A
        # reference that is to move needs weights of its own.
        keep = None if peft_config is None and not config.sync_ref_model else "adapter"
    else:
        _prepare_full(model, given)
        keep = "model"
    for settings in getattr(model, "peft_config", {}).values():
        check_kind(settings)
    rests = resting_dtype(config, compute_dtype)
    if keep != "model":
        prepare(model, compute_dtype)
    if given and rests is not None:
        say_what_is_cast(model, rests)
        rests = None  # what a cast rounds off is its owner's
    # After the adapters, which may be on the head. A family that is not understood fails here and
    # not in the first update.
    mixed = keep != "model"  # of bfloat16 and the float32 of what trains
    with autocast() if mixed else contextlib.nullcontext():
        check_head(causal_lm)
        check_causal(causal_lm)
    if config.gradient_checkpointing:
        enable_checkpointing(causal_lm)
    model.train()
    with autocast() if mixed else contextlib.nullcontext(), at_rest_after(model, rests):
        calm = _trains_as_it_samples(model, causal_lm, config)
    return {
        "model": model,
        "compute_dtype": compute_dtype,
        "temperature": config.temperature,
        "keep_reference": keep if config.beta else None,
        "new_adapter": new_adapter,
        "shared_prompt": config.shared_prompt,
        "router": router,
        "disable_dropout": config.disable_dropout,
        "trains_as_it_samples": calm,
    }


def _trains_as_it_samples(model: Any, causal_lm: Any, config: GRPOConfig) -> bool:
    """Whether modules have to be in eval mode in the update as well, for ratio and KL of the first
    step to be 1 and 0. Says it where they will not be."""
    kind = type(causal_lm).__name__
    if not config.disable_dropout and (places := own_dropout(model)):
        log.warning(
            "disable_dropout: false, and %s drops up to %g of its values while it trains: ratio "
            "and KL compare it with itself without dropout, and are not 1 and 0 on the first step.",
            kind,
            greatest(places),
        )
    decoder = causal_lm.get_decoder()
    if not computes_otherwise_in_training(model, decoder):
        return False
    if config.disable_dropout and not computes_otherwise_in_training(model, decoder, as_it_samples):
        log.info("%s computes something else in training mode, and trains without it.", kind)
        return True
    log.warning(
        "%s computes something else while it trains than while it samples, dropout aside (some "
        "mixtures of experts draw their experts): ratio and KL are not exactly 1 and 0 on the "
        "first step.",
        kind,
    )
    return False


def _say_what_a_given_model_decides(config: GRPOConfig) -> None:
    """Options that are about loading, where there is nothing to load."""
    loading = ("dtype", "attn_implementation", "load_in_4bit", "gguf_file", "model_init_kwargs")
    defaults = {spec.name: spec.default for spec in dataclasses.fields(config)}
    named = [name for name in loading if getattr(config, name) != defaults[name]]
    if named:
        log.warning(
            "The model was given, not its name: %s %s no part in it.",
            ", ".join(named),
            "has" if len(named) == 1 else "have",
        )


def _refuse_beside_an_adapter(
    model: Any, config: GRPOConfig, peft_config: Any, saved: AdapterFiles | None
) -> None:
    """An adapter that is there is trained; what asks for something else is not ignored."""
    inside = has_adapters(model)
    if saved is not None and inside:
        raise ModelError(
            f"The model already has an adapter ({', '.join(unwrapped(model).peft_config)}) beside "
            f"{saved.name!r}. Merge it first (merge_and_unload), or load the model without it."
        )
    if config.finetuning_type == "full":
        raise ModelError(
            "finetuning_type: full trains the weights of a model, and this one has an adapter. "
            "Merge it first (merge_and_unload of peft), or set finetuning_type: lora to train the "
            "adapter."
        )
    if peft_config is not None:
        raise ModelError(
            "peft_config describes a new adapter, but the model already has one. Leave peft_config "
            "out to train that one further; for a new one load the model again, or merge the old "
            "one first (merge_and_unload)."
        )
    for settings in getattr(model, "peft_config", {}).values():
        check_options(config, settings, "of the model")


def load_model(config: GRPOConfig, device: torch.device) -> nn.Module:
    """The causal LM that ``config`` names, on ``device``. Raises ModelError."""
    import transformers

    source, arguments = source_of(config)
    arguments |= remaining(config)
    _check_device_map(arguments.pop("device_map", None), device)
    if config.attn_implementation:
        arguments["attn_implementation"] = config.attn_implementation
    if config.trust_remote_code:
        log.warning(
            "trust_remote_code: running code of %s, revision %s",
            source,
            config.model_revision or "main",
        )
    settings = model_settings(config)
    liger_layers.check_type(config, settings)
    auto: Any = transformers.AutoModelForCausalLM
    if settings is not None:
        auto = auto_class(settings, source)
    if "gguf_file" in arguments and hasattr(transformers, "GgufConfig"):
        # Else it depends on what is installed whether the weights stay in blocks of 4 bits.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if config.load_in_4bit:
        arguments["quantization_config"] = _four_bit(config, device)
    try:
        with stages.stage("loading the model"), _bars("gguf_file" in arguments):
            loaded: Any = auto.from_pretrained(
                source,
                dtype=weights_dtype(config, device),
                device_map={"": device},
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **arguments,
            )
    except Exception as error:  # as for tokenizers
        raise no_model(config, source, error) from error
    model, report = loaded
    if "gguf_file" in arguments:
        _forget_gguf(model)
    if missing := report["missing_keys"]:
        raise ModelError(
            f"{source!r} has no weights for {min(missing)} ({len(missing)} missing): they would be "
            f"random. Expected a complete {type(model).__name__}."
        )
    return model


@contextlib.contextmanager
def _bars(gguf: bool) -> Iterator[None]:
    with loading_bars.told(), loading_bars.told_of_gguf() if gguf else contextlib.nullcontext():
        yield


def _forget_gguf(model: Any) -> None:
    """The weights were dequantised: without the note that they were not, the model can be trained
    in full and saved."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def weights_dtype(config: GRPOConfig, device: torch.device) -> torch.dtype | str:
    """``stored_dtype`` as from_pretrained takes it."""
    return stored_dtype(config, pick_compute_dtype(config.bf16, config.fp16, device)) or "auto"


def _prepare_full(model: nn.Module, given: bool) -> None:
    if _is_quantized(model):
        raise ModelError(
            "finetuning_type: full cannot train quantised weights; use lora, or leave out "
            "load_in_4bit."
        )
    model.requires_grad_(True)
    dtypes = {p.dtype for p in model.parameters()} - {torch.float32}
    if dtypes and given:
        log.warning(
            "The weights that train are %s: updates below 1/256 of a weight are lost. "
            "Load the model with dtype=torch.float32.",
            ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)),
        )


def enable_checkpointing(causal_lm: Any) -> None:
    # transformers 5.2x renamed the method, its argument and warns about the old names.
    if hasattr(causal_lm, "activation_checkpointing_enable"):
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    else:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpoints need it: a gradient of the embeddings' output that nobody reads,
    # of the size of two layer inputs.
    if hasattr(causal_lm, "_require_grads_hook"):
        causal_lm.disable_input_require_grads()


def _is_quantized(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def _four_bit(config: GRPOConfig, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    compute_dtype = pick_compute_dtype(config.bf16, config.fp16, device)

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=compute_dtype or torch.float32,
    )
