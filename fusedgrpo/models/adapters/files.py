"""Adapters in a folder or on the Hub: found, held against the options, and put onto a model."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import nn

from fusedgrpo.config.from_pretrained import PLACES
from fusedgrpo.errors import ModelError, PlanError, reason
from fusedgrpo.models.adapters.attached import SETTINGS, WEIGHTS

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

log = logging.getLogger("fusedgrpo")

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "lm_head", "embed_out")


@dataclass(frozen=True)
class AdapterFiles:
    """A saved adapter. name: its directory or Hub id; base, base_revision: the model that it says
    it was trained on."""

    name: str
    revision: str | None
    settings: Any
    places: Mapping[str, Any]  # where Hub files are kept, and with which token

    @property
    def base(self) -> str | None:
        return self.settings.base_model_name_or_path or None

    def file(self, name: str) -> str | None:
        return _file(self.name, name, self.revision, self.places)

    def folder(self) -> str:
        """Where its files are on this machine. Raises ModelError."""
        weights = self.file(WEIGHTS) or self.file("adapter_model.bin")
        if weights is None:
            raise ModelError(
                f"The adapter {self.name!r} has no weights: expected {WEIGHTS} beside {SETTINGS}."
            )
        return os.path.dirname(weights)

    @property
    def leaves_base_as_it_is(self) -> bool:
        """Whether the model with this adapter is its base once more where the adapter is switched
        off. Some start by taking a part out of the base (PiSSA, OLoRA), train its biases or bring
        embeddings of their own; of other kinds than LoRA it is not known. Raises ModelError."""
        settings = self.settings
        return (
            settings.peft_type.value == "LORA"
            and settings.bias == "none"
            and settings.init_lora_weights in (True, False, "gaussian")
            and self.vocabulary() is None
        )

    def vocabulary(self) -> int | None:
        """Rows of the embeddings that are in its file; None if there are none."""
        file = self.file(WEIGHTS)
        if file is None:
            return None
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118 - it is no dict
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read: {error}") from error
        for key, shape in shapes.items():
            layer = key.removesuffix(".weight").removesuffix(".base_layer")
            layer = layer.removesuffix(".token_adapter").rpartition(".")[2]
            if key.endswith(".weight") and layer in EMBEDDINGS:
                return int(shape[0])
        return None


def find_adapter(config: GRPOConfig) -> AdapterFiles | None:
    """The adapter that training goes on from: ``adapter_name_or_path``, or ``model_name_or_path``
    where that is an adapter and no model. Raises ModelError."""
    model = os.path.expanduser(config.model_name_or_path or "")
    on_top = None
    if (
        model
        and not model.endswith(".gguf")
        and not os.path.exists(os.path.join(model, "config.json"))
    ):
        on_top = _read(model, config.model_revision, config)
    if not config.adapter_name_or_path:
        return on_top
    name = os.path.expanduser(config.adapter_name_or_path)
    if on_top is not None:
        raise ModelError(
            f"model_name_or_path: {model!r} is an adapter, and so is adapter_name_or_path: "
            f"{name!r}; one is trained. Give the base {on_top.base!r} as the model, or merge the "
            "first one into it."
        )
    found = _read(name, None, config)
    if found is None:
        inside = Path(name, "adapter")
        hint = f" Is {inside} meant?" if os.path.exists(inside / SETTINGS) else ""
        raise ModelError(
            f"adapter_name_or_path: {name!r} has no {SETTINGS}: expected a directory or Hub id "
            f"with what save_pretrained of peft writes.{hint}"
        )
    return found


def base_of(config: GRPOConfig) -> tuple[str, str | None]:
    """Name and revision of the model that ``config`` names, or that its adapter does. Raises
    ModelError."""
    adapter = find_adapter(config)
    model = config.model_name_or_path
    if model and (adapter is None or config.adapter_name_or_path):
        return model, config.model_revision
    if adapter is None:
        raise ModelError("model_name_or_path is missing: give a model directory or a Hub id.")
    if not adapter.base:
        raise ModelError(
            f"The adapter {adapter.name!r} does not say which model it belongs to: give that one "
            "as model_name_or_path, and the adapter as adapter_name_or_path."
        )
    return adapter.base, adapter.settings.revision


def put_onto(model: nn.Module, adapter: AdapterFiles, config: GRPOConfig, device: Any) -> nn.Module:
    """``model`` with the adapter on it, ready to be trained further. Raises ModelError."""
    from peft import PeftModel

    check_options(config, adapter.settings, repr(adapter.name))
    causal_lm: Any = model
    folder = adapter.folder()
    rows = adapter.vocabulary()
    if rows is not None and rows != causal_lm.get_input_embeddings().weight.shape[0]:
        causal_lm.resize_token_embeddings(rows, mean_resizing=False)
    try:
        with warnings.catch_warnings():
            # What the file lacks would be random.
            warnings.filterwarnings("error", ".*missing adapter keys")
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            wrapped = PeftModel.from_pretrained(
                causal_lm,
                folder,
                is_trainable=not adapter.settings.is_prompt_learning,
                torch_device=str(device),
            )
    except Exception as error:  # foreign code reads foreign files: it may raise anything
        raise ModelError(
            f"The adapter {adapter.name!r} cannot be put onto {type(model).__name__}: "
            f"{reason(error)}"
        ) from error
    log.info("Training goes on from the adapter %s.", adapter.name)
    return wrapped


def check_options(config: GRPOConfig, settings: Any, whose: str) -> None:
    """Refuse lora options that were given and that the adapter contradicts. Raises ModelError."""
    defaults = {spec.name: spec.default for spec in fields(config)}
    pairs = {
        "lora_r": "r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "use_rslora",
        "lora_target_modules": "target_modules",
    }
    wrong = []
    for option, name in pairs.items():
        asked, own = getattr(config, option), getattr(settings, name, None)
        if asked != defaults[option] and _comparable(asked) != _comparable(own):
            own = sorted(own) if isinstance(own, set) else own
            wrong.append(f"{option}: {asked} (it has {own})")
    if wrong:
        raise ModelError(
            f"The adapter {whose} keeps its own shape, which contradicts {'; '.join(wrong)}. Leave "
            "these options out, or train a new adapter on a model without one."
        )


def planned_options(config: GRPOConfig) -> GRPOConfig:
    """``config`` with the shape of the adapter that is trained further, for a plan of its memory.
    Raises PlanError, ModelError."""
    adapter = find_adapter(config)
    if adapter is None:
        return config
    settings = adapter.settings
    plain = settings.peft_type.value == "LORA" and not any(
        getattr(settings, name, None)
        for name in ("modules_to_save", "trainable_token_indices", "rank_pattern", "use_dora")
    )
    targets = settings.target_modules if plain else None
    if not targets or (isinstance(targets, str) and targets != "all-linear"):
        raise PlanError(
            f"The memory of the adapter {adapter.name!r} is not planned: only that of plain LoRA "
            "with a list of modules is."
        )
    return replace(
        config,
        lora_r=settings.r,
        lora_dropout=settings.lora_dropout,
        lora_target_modules=targets if isinstance(targets, str) else sorted(_comparable(targets)),
    )


def _comparable(value: Any) -> Any:
    """Names of modules as a set of their last parts: peft writes some whole, of every layer."""
    if isinstance(value, (list, tuple, set)):
        return {str(name).rpartition(".")[2] for name in value}
    return value


def _read(name: str, revision: str | None, config: GRPOConfig) -> AdapterFiles | None:
    given = config.model_init_kwargs or {}
    places = {key: value for key, value in given.items() if key in PLACES}
    file = _file(name, SETTINGS, revision, places)
    if file is None:
        return None
    from peft import PeftConfig

    try:
        settings = PeftConfig.from_pretrained(os.path.dirname(file))
    except Exception as error:  # as above
        raise ModelError(f"{file} is no configuration of an adapter: {reason(error)}") from error
    return AdapterFiles(name, revision, settings, places)


def _file(name: str, file: str, revision: str | None, places: Mapping[str, Any]) -> str | None:
    from transformers.utils import cached_file

    if os.path.isabs(name) and not os.path.isdir(name):
        return None
    try:
        found = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **places,
        )
    except (OSError, ValueError):
        return None  # no such repository: said by from_pretrained, which looks for it next
    return None if found is None else str(found)
