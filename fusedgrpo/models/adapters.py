"""Adapters inside a causal LM: which act, which train, how they are saved and brought back.

peft puts its layers into the modules of the model and may or may not wrap the whole. Everything
here asks the modules, so that it does not matter how the adapters got there: ``get_peft_model``,
``model.add_adapter``, an adapter folder given to ``from_pretrained``, or an earlier trainer.
"""

from __future__ import annotations

import contextlib
import copy
import logging
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

from fusedgrpo.errors import CheckpointError, ModelError

log = logging.getLogger("fusedgrpo")

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
    return hasattr(model, "disable_adapter") or bool(_layers(model))


def _layers(model: nn.Module) -> list[Any]:
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
        for layer in _layers(self.model):
            if not layer.disable_adapters:
                names |= dict.fromkeys(layer.active_adapters)
        return [name for name in names if name in self.configs]

    @cached_property
    def trained(self) -> list[str]:
        trains = {_storage(p) for p in self.model.parameters() if p.requires_grad}
        return [n for n in self.active if trains & {_storage(t) for t in self.tensors(n).values()}]

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
            self._save_one(name, path / _folder(name), embeddings=False)
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
            own = path / _folder(name)  # also where earlier versions put any but "default"
            folder = own if (own / WEIGHTS).exists() or index else path
            _copy_into(self.tensors(name), self.embeddings(), folder / WEIGHTS)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is the base. Unlike peft's own switch, this one leaves alone which
        weights require gradients."""
        layers = [layer for layer in _layers(self.model) if not layer.disable_adapters]
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


def prepare(model: Any, compute_dtype: torch.dtype | None) -> Adapters:
    """Check that the adapters of ``model`` can train here and that all that trains will be saved.

    Weights that train become float32: in bfloat16 they would lose GRPO's small updates. Raises
    ModelError.
    """
    adapters = Adapters(model)
    if any(getattr(layer, "merged", False) for layer in _layers(model)):
        raise ModelError(
            "The adapter is merged into the weights, so that it has no gradient: call "
            "model.unmerge_adapter() first."
        )
    trained = adapters.trained
    if not trained:
        raise ModelError(_nothing_trains(adapters))
    saved = {_storage(t) for name in trained for t in adapters.tensors(name).values()}
    idle = {
        _storage(t)
        for name in adapters.configs
        if name not in adapters.active
        for t in adapters.tensors(name).values()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or _storage(parameter) in saved:
            continue
        if _storage(parameter) not in idle:
            raise ModelError(
                f"{name} requires gradients but belongs to no active adapter: it would train and "
                "not be saved. Name its module in modules_to_save of the adapter, or freeze it "
                "with requires_grad_(False)."
            )
        parameter.requires_grad_(False)  # it acts on nothing, so it has no gradient either
    _to_float32(adapters, compute_dtype)
    for name in adapters.active:
        if name not in trained:
            log.info("The adapter %r stays frozen; it is saved in adapter/%s.", name, _folder(name))
    if not adapters.base:
        log.info("The model has no name that it could be loaded by: adapter/ will name no base.")
    return adapters


def _nothing_trains(adapters: Adapters) -> str:
    active = adapters.active or list(adapters.configs)
    idle = [
        name
        for name in adapters.configs
        if name not in active and any(p.requires_grad for p in _parameters(adapters, name))
    ]
    names = ", ".join(repr(name) for name in active)
    if idle:
        return (
            f"The adapter {idle[0]!r} requires gradients, but active is {names}, which does not. "
            f"Call model.set_adapter({idle[0]!r}) first."
        )
    return (
        f"No weight of the adapter {names} requires gradients: it was loaded for inference. Load "
        "it with is_trainable=True, as in PeftModel.from_pretrained(model, folder, "
        f"is_trainable=True), or call model.set_adapter({active[0]!r}); a folder or Hub id can "
        "also be given as model itself or as adapter_name_or_path."
    )


def _parameters(adapters: Adapters, name: str) -> list[nn.Parameter]:
    own = {_storage(t) for t in adapters.tensors(name).values()}
    return [p for p in adapters.model.parameters() if _storage(p) in own]


def _to_float32(adapters: Adapters, compute_dtype: torch.dtype | None) -> None:
    """Without autocast a module that is trained whole must keep the dtype of its neighbours; the
    layers of an adapter convert by themselves."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    dtype = adapters.causal_lm.dtype
    converts = {
        id(parameter)
        for layer in adapters.model.modules()
        if isinstance(layer, BaseTunerLayer)
        for names in layer.adapter_layer_names
        for parameter in _below(layer, names)
    }
    raised, kept = 0, 0
    for parameter in adapters.model.parameters():
        if not parameter.requires_grad or parameter.dtype == torch.float32:
            continue
        if compute_dtype is not None or dtype == torch.float32 or id(parameter) in converts:
            parameter.data = parameter.data.float()
            raised += 1
        else:
            kept += 1
    if raised:
        log.info(
            "%d tensors of the adapter that were in 16 bits train, and are saved, in float32.",
            raised,
        )
    if kept:
        log.warning(
            "%d tensors train in %s: updates below 1/256 of a weight are lost. Load the model with "
            "dtype=torch.float32, or compute with bf16: true.",
            kept,
            str(dtype).removeprefix("torch."),
        )


def _below(layer: Any, name: str) -> list[nn.Parameter]:
    holder: Any = layer
    for part in name.split("."):
        holder = getattr(holder, part, None)
    return list(holder.parameters()) if isinstance(holder, nn.Module) else []


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


def _folder(name: str) -> str:
    return re.sub(r"[^\w-]", "_", name)


def _storage(tensor: Tensor) -> tuple[torch.device, int, int]:
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
