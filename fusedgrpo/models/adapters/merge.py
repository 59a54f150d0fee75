"""An adapter merged into its base, as a model of 16 bits that anything loads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedgrpo.errors import ModelError
from fusedgrpo.models import full_weights
from fusedgrpo.models.adapters.files import AdapterFiles, put_onto

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

# Between the logits of 16-bit models that compute the same in another order, several percent.
_MOST = 0.25


def several(folder: Path) -> list[str]:
    """The adapters that act beside the one in ``folder``, by the names of their folders."""
    return sorted(file.parent.name for file in folder.glob("*/adapter_config.json"))


def write_merged(
    config: GRPOConfig, adapter: AdapterFiles, base: Any, tokenizer: Any, path: Path
) -> float:
    """Write ``base`` with ``adapter`` merged into it, and the tokenizer, into ``path``. Returns by
    which share the logits of a few random tokens differ from those of base and adapter.

    base: the model on the CPU, its weights not quantised; it is used up. peft computes the products
    in float32 and rounds the sums to the weights' dtype. Raises ModelError.
    """
    if adapter.settings.is_prompt_learning:
        raise ModelError(
            f"The adapter {adapter.name!r} is a prompt ({adapter.settings.peft_type.value}) and "
            "has nothing to merge; load it with peft."
        )
    if getattr(base, "is_quantized", False):
        raise ModelError(
            f"The base of {adapter.name!r} is stored quantised, and nothing is merged into rounded "
            "weights; name the model in 16 bits that it was made of with --base."
        )
    wrapped: Any = put_onto(base, adapter, config, torch.device("cpu"))
    _untie(wrapped.get_base_model())
    before = _logits(wrapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        merged = wrapped.merge_and_unload(safe_merge=True)  # refuses NaN
    after = _logits(merged)
    error = float((after - before).norm() / before.norm())
    if not error < _MOST:
        raise ModelError(
            f"The merged model is another one: its logits differ by {error:.0%} from those of base "
            f"and adapter. {adapter.name!r} is better loaded with peft."
        )
    merged.requires_grad_(False)
    full_weights.save(merged, path)
    tokenizer.save_pretrained(path)
    return error


def _untie(model: Any) -> None:
    """A head of its own, where an adapter on it would be merged into the embeddings as well."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or (not hasattr(head, "base_layer") and not hasattr(embeddings, "base_layer")):
        return
    own, theirs = getattr(head, "base_layer", head), getattr(embeddings, "base_layer", embeddings)
    if own.weight.data_ptr() == theirs.weight.data_ptr():
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """``[1, 16, V]`` float32."""
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, (1, 16), generator=generator)
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits.float()
