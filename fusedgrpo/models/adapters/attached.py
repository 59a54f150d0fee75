"""Adapters inside a causal LM: which act, which train, how they are saved and brought back.

peft puts its layers into the modules of the model and may or may not wrap the whole. Everything
here asks the modules, so that it does not matter how the adapters got there: ``get_peft_model``,
``model.add_adapter``, an adapter folder given to ``from_pretrained``, or an earlier trainer.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusedgrpo.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
# What a PeftModel puts before the names of the model's own modules; files always have it.
PREFIX = "base_model.model."


def unwrapped(model: Any) -> Any:
    """The transformers model itself, its adapters still inside."""
    while hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model


def has_adapters(model: Any) -> bool:
    """Whether there is anything of peft's in ``model`` or around it."""
    return hasattr(model, "disable_adapter") or bool(adapter_layers(model))


def adapter_layers(model: nn.Module) -> list[Any]:
    """peft's layers, and its wrappers of modules that are trained whole or by tokens."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


class Adapters:
    """The adapters of ``model``, by their names.

    active: those that take part in the forward pass. trained: those of them that have weights which
    require gradients; all others stay as they are. base: what the base model is loaded by, a Hub id
    or an absolute path (adapters are loaded from elsewhere); None for a model made in memory.
    """

    def __init__(self, model: Any):
        self.model = model
        self.causal_lm = unwrapped(model)
        self.configs: dict[str, Any] = getattr(model, "peft_config", {})
        names = [getattr(self.causal_lm, "name_or_path", None)]
        names += [settings.base_model_name_or_path for settings in self.configs.values()]
        self.base = next((absolute(name) for name in names if name), None)

    @property
    def active(self) -> list[str]:
        """In the order of peft."""
        names: dict[str, None] = {}
        for layer in adapter_layers(self.model):
            if not layer.disable_adapters:
                names |= dict.fromkeys(layer.active_adapters)
        return [name for name in names if name in self.configs]

    @cached_property
    def trained(self) -> list[str]:
        trains = {storage(p) for p in self.model.parameters() if p.requires_grad}
        return [n for n in self.active if trains & {storage(t) for t in self.tensors(n).values()}]

    @cached_property
    def saves_embeddings(self) -> bool:
        """Whether the embeddings are not those that loading the base would give: resized, or of a
        model that can be loaded by no name."""
        if self.base is None:
            return True
        known = _base_vocabulary(self.base, type(self.causal_lm.config))
        rows = self.causal_lm.get_input_embeddings().weight.shape[0]
        return known is not None and known != rows

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The adapter's own tensors (no copies) by their names in a file of peft."""
        from peft import get_peft_model_state_dict

        found = get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers=False
        )
        return {_file_key(key): tensor for key, tensor in found.items()}

    def embeddings(self) -> dict[str, Tensor]:
        """Weights of the input and output embeddings by their names in a file of peft, as far as no
        adapter has them."""
        layers = (self.causal_lm.get_input_embeddings(), self.causal_lm.get_output_embeddings())
        own = [_own_layer(layer) for layer in layers]
        return {
            f"{PREFIX}{name}.{key}": tensor
            for name, module in self.causal_lm.named_modules()
            if any(module is layer for layer in own)
            for key, tensor in module.state_dict().items()
        }

    def save(self, path: Path) -> None:
        """Write the trained adapter as peft reads it, whatever its name is. Others that act beside
        it go into folders of their names; those that are switched off are not written."""
        first, *rest = [*self.trained, *(n for n in self.active if n not in self.trained)]
        self._save_one(first, path, embeddings=self.saves_embeddings)
        for name in rest:
            self._save_one(name, path / folder_of(name), embeddings=False)
        if hasattr(self.model, "create_or_update_model_card"):
            self.model.create_or_update_model_card(path)

    def _save_one(self, name: str, path: Path, embeddings: bool) -> None:
        path.mkdir(parents=True, exist_ok=True)
        tensors = self.tensors(name) | (self.embeddings() if embeddings else {})
        # Copies: safetensors refuses shared memory, and tied weights share theirs.
        copies = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}
        save_file(copies, path / WEIGHTS, metadata={"format": "pt"})
        settings = copy.copy(self.configs[name])
        settings.inference_mode = True
        settings.task_type = settings.task_type or "CAUSAL_LM"
        settings.base_model_name_or_path = self.base
        settings.save_pretrained(str(path))

    def restore(self, path: Path) -> None:
        """Put back what ``save`` has written, bit for bit. Raises CheckpointError."""
        for index, name in enumerate(self.trained):
            own = path / folder_of(name)  # also where earlier versions put any but "default"
            folder = own if (own / WEIGHTS).exists() or index else path
            _copy_into(self.tensors(name), self.embeddings(), folder / WEIGHTS)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is the base. Unlike peft's own switch, this one leaves alone which
        weights require gradients."""
        layers = [layer for layer in adapter_layers(self.model) if not layer.disable_adapters]
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def describe(self) -> str:
        """``LoRA r=16``, for the line of the plan."""
        texts = []
        for name in self.trained:
            settings = self.configs[name]
            kind = {"LORA": "LoRA"}.get(settings.peft_type.value, settings.peft_type.value)
            rank = f" r={settings.r}" if hasattr(settings, "r") else ""
            texts.append(f"{kind}{rank}" + ("" if name == "default" else f" ({name})"))
        return " and ".join(texts)


def _copy_into(own: Mapping[str, Tensor], embeddings: Mapping[str, Tensor], file: Path) -> None:
    try:
        saved = load_file(file)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    target = {**embeddings, **own}
    unknown = saved.keys() - target.keys()
    missing = own.keys() - saved.keys()
    if unknown or missing:
        raise CheckpointError(
            f"{file} holds an adapter for other modules: {min(unknown or missing)}."
        )
    for key, tensor in saved.items():
        if tensor.shape != target[key].shape:
            raise CheckpointError(
                f"{file} holds an adapter of another size: {key} is {list(tensor.shape)}, expected "
                f"{list(target[key].shape)}."
            )
        target[key].copy_(tensor)


def _file_key(key: str) -> str:
    """A model wrapped twice, or not at all, has its tensors under the same names in the file."""
    inner = key
    while inner.startswith(PREFIX):
        inner = inner.removeprefix(PREFIX)
    return key if inner == key and key.startswith("base_model.") else PREFIX + inner


def folder_of(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name)


def storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    return tensor.device, tensor.data_ptr(), tensor.numel()


def absolute(name: str) -> str:
    """The name of a model as it can be used from any working directory."""
    path = Path(name).expanduser()
    return str(path.absolute()) if os.path.exists(path) else name


def _own_layer(layer: Any) -> Any:
    """The model's own layer below peft's; None where a trained copy stands in for it."""
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(layer, ModulesToSaveWrapper):
        return None
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
    while hasattr(layer, "base_layer"):
        layer = layer.base_layer
    return layer


def _base_vocabulary(base: str, kind: Any) -> int | None:
    """Rows of the embeddings of the base as it is stored; None where that is not known."""
    arguments = {"gguf_file": file} if (file := only_gguf(base)) else {}
    try:
        settings = kind.from_pretrained(base, local_files_only=True, **arguments)
    except (OSError, ValueError):
        return None  # no longer in the cache
    return getattr(settings.get_text_config(), "vocab_size", None)


def only_gguf(directory: str) -> str | None:
    """The GGUF file that a directory is there for, if that is plain to see."""
    path = Path(directory)
    if not os.path.isdir(path) or (path / "config.json").exists():
        return None
    files = sorted(file.name for file in path.glob("*.gguf"))
    return files[0] if len(files) == 1 else None
