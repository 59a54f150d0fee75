"""Weights of a model that trains as a whole: written as transformers reads them, put back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fusedgrpo.errors import CheckpointError, reason
from fusedgrpo.models import loading_bars


def save(model: Any, path: Path) -> None:
    """transformers refuses to write generation settings that contradict each other (temperature
    without do_sample) or that are in the model's configuration, after a whole run; here they are
    written as they came, where they belong."""
    from transformers import GenerationConfig

    own = model.generation_config
    found = model.config._get_generation_parameters()
    # Values of a class cannot be taken away for the moment; of those transformers says so itself.
    misplaced = {name: value for name, value in found.items() if name in vars(model.config)}
    written = copy.deepcopy(own) or GenerationConfig()
    for name, value in misplaced.items():
        if getattr(written, name, None) is None:
            setattr(written, name, value)
        delattr(model.config, name)
    model.generation_config = GenerationConfig()
    try:
        with loading_bars.told():
            model.save_pretrained(path)
    finally:
        model.generation_config = own
        for name, value in misplaced.items():
            setattr(model.config, name, value)
    written.to_json_file(path / "generation_config.json")


def restore(model: nn.Module, path: Path) -> None:
    """Put back what ``save`` has written, bit for bit. Raises CheckpointError."""
    saved: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            saved |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not saved:
        raise CheckpointError(f"{path.parent} holds no model weights: was it a LoRA run?")
    if not saved.keys() <= model.state_dict().keys():
        saved = _converted(model, path) or saved
    result: Any = model.load_state_dict(saved, strict=False)
    # A tied weight is saved once; loading one of its names has filled the other.
    filled = {p.data_ptr() for name, p in model.named_parameters() if name in saved}
    missing = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in result.missing_keys and p.data_ptr() not in filled
    ]
    if missing or result.unexpected_keys:
        name = (missing or result.unexpected_keys)[0]
        raise CheckpointError(f"{path.parent} holds the weights of another model: {name}.")


def _converted(model: Any, path: Path) -> dict[str, Tensor] | None:
    """Weights that are saved under other names than the model has them by (experts one by one, as
    on the Hub), put together by transformers; None if they are another model's."""
    try:
        loaded, report = type(model).from_pretrained(
            path, dtype=model.dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # foreign code, which may raise anything
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from error
    if report["missing_keys"] or report["unexpected_keys"]:
        return None
    found: dict[str, Tensor] = loaded.state_dict()
    return found
