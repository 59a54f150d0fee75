"""Texts that end a completion, beside the EOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class StopTexts:
    """Whether a completion has just said one of ``texts``: with the first token after which one is
    in its text, special tokens included. It stays in the completion, and so does what that token
    says after it.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self.tokenizer = tokenizer
        self.texts = tuple(texts)
        # No token but says a byte at least, and no character has more than four.
        self._tail = max((4 * len(text) for text in texts), default=0) + 4

    def __bool__(self) -> bool:
        return bool(self.texts)

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether the tokens ``ids`` of a completion end with the one that completes a text, given
        that they did not without it."""
        # The text of a tail may begin otherwise than it is in the whole: that has the last word.
        return self._has(ids[-self._tail :]) and (len(ids) <= self._tail or self._has(ids))

    def cut(self, ids: Sequence[int]) -> int | None:
        """How many of ``ids`` there are with the token that completes a text; None without."""
        if not self.texts or not self._has(ids):
            return None
        return next((k for k in range(1, len(ids) + 1) if self.ended(ids[:k])), None)

    def _has(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return any(stop in text for stop in self.texts)
