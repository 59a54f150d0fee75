"""The tokenizer of a run, or a Processor that has one; which ids end a completion."""

from __future__ import annotations

import logging
import os
from typing import Any

from fusedgrpo import stages
from fusedgrpo.config.from_pretrained import PLACES
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ModelError, brief, reason
from fusedgrpo.models.adapters.files import find_adapter
from fusedgrpo.models.head import vocabulary_size
from fusedgrpo.models.settings import remaining, source_of

log = logging.getLogger("fusedgrpo")


def load_tokenizer(config: GRPOConfig) -> Any:
    """The tokenizer of the run, without its model: that of an adapter, if it has one, was trained
    with it. Raises ModelError."""
    from transformers import AutoTokenizer

    source, arguments = source_of(config)
    adapter = find_adapter(config)
    places = {name: value for name, value in remaining(config).items() if name in PLACES}
    if config.tokenizer_name_or_path:
        source, arguments = os.path.expanduser(config.tokenizer_name_or_path), {}
    elif adapter is not None and adapter.file("tokenizer_config.json"):
        source, arguments = adapter.name, {"revision": adapter.revision}
    try:
        with stages.stage("loading the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=config.trust_remote_code, **places, **arguments
            )
        tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer.pad_token_id
    except Exception as error:  # foreign code reads foreign files: there is nothing it cannot raise
        raise ModelError(
            f"No tokenizer could be loaded from {source!r}: {reason(error)}"
        ) from error
    return tokenizer


def check_tokenizer(tokenizer: Any, model: Any) -> None:
    """Say which ids of the tokenizer the model does not have; choose a pad token and say so.

    Rows with such an id are refused one by one (Gemma 3 has one, for pictures). Padding never
    decides anything here (masks come from lengths), so any token will do. Raises ModelError.
    """
    size = vocabulary_size(model)
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= size)
    if beyond:
        log.warning(
            "The tokenizer has %d tokens with ids from %d on, such as %r, but the model only knows "
            "ids below %d: rows that contain one cannot be used. Do tokenizer_name_or_path and "
            "model_name_or_path belong together?",
            len(beyond),
            beyond[0],
            tokenizer.convert_ids_to_tokens(beyond[0]),
            size,
        )
    if not eos_ids(model, tokenizer):
        raise ModelError(
            "Neither the tokenizer nor the model's generation_config names an end-of-sequence "
            f"token below {size}, the number of the model's tokens, so no completion could ever "
            "end. Set tokenizer.eos_token."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        log.info("The tokenizer has no pad token: %r is used.", tokenizer.pad_token)


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: the generation config's, and the tokenizer's; none that
    the model cannot say."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if not all(type(i) is int for i in ids):
        raise ModelError(
            f"generation_config.json: eos_token_id is {brief(ids)}, expected token ids. Correct it."
        )
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    size = vocabulary_size(model)
    return [i for i in ids if 0 <= i < size]


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that ``decode(skip_special_tokens=True)`` leaves out, by their ids."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return known | {i: str(token) for i, token in added.items() if token.special}


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a Processor; any tokenizer as it is. Raises ModelError if it has none."""
    if not _is_processor(processing_class):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"{type(processing_class).__name__} has no tokenizer; give a tokenizer.")
    return tokenizer


def chat_template_of(processing_class: Any, *, with_tools: bool = False) -> Any:
    """The chat template: the Processor's if it has one, else the tokenizer's. with_tools: the one
    named ``tool_use``, if there are several and one has that name."""
    own = getattr(processing_class, "chat_template", None)
    if not own and _is_processor(processing_class):
        own = getattr(text_tokenizer(processing_class), "chat_template", None)
    if not isinstance(own, dict):
        return own
    name = "tool_use" if with_tools and "tool_use" in own else "default"
    return own.get(name, own)


def _is_processor(processing_class: Any) -> bool:
    from transformers import ProcessorMixin

    return isinstance(processing_class, ProcessorMixin)
