"""A tokenizer, or a Processor that has one: what of it handles text."""

from __future__ import annotations

from typing import Any

from fusedgrpo.errors import ModelError


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a Processor; any tokenizer as it is. Raises ModelError if it has none."""
    if not _is_processor(processing_class):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(f"{type(processing_class).__name__} has no tokenizer; give a tokenizer.")
    return tokenizer


def chat_template_of(processing_class: Any) -> Any:
    """The chat template: the Processor's if it has one, else the tokenizer's."""
    own = getattr(processing_class, "chat_template", None)
    if not own and _is_processor(processing_class):
        return getattr(text_tokenizer(processing_class), "chat_template", None)
    return own["default"] if isinstance(own, dict) and "default" in own else own


def _is_processor(processing_class: Any) -> bool:
    from transformers import ProcessorMixin

    return isinstance(processing_class, ProcessorMixin)
