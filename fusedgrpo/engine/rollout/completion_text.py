"""The text of a completion, as reward functions and logs get it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from fusedgrpo.models.tokenizer import special_tokens

logger = logging.getLogger("fusedgrpo")


class CompletionText:
    """Decodes completions, without special tokens or (``skip_special_tokens=False``) with all but
    the EOS that ended one.

    Special tokens that are left out and are neither EOS nor padding are said, once: they may be
    the tags that a reward function looks for.
    """

    def __init__(self, tokenizer: Any, eos_ids: Collection[int], *, skip_special_tokens: bool):
        self.tokenizer = tokenizer
        self.eos_ids = frozenset(eos_ids)
        self.skip = skip_special_tokens
        self._hidden = frozenset(special_tokens(tokenizer)) - self.eos_ids
        self._hidden -= {getattr(tokenizer, "pad_token_id", None)}
        self._said = False

    def __call__(self, ids: Sequence[int], *, ended: bool) -> str:
        """The text of ``ids``; ended: the last of them is the EOS."""
        if not self.skip:
            return self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        if not self._said and not self._hidden.isdisjoint(ids):
            self._said = True
            tokens = sorted(self.tokenizer.decode([i]) for i in self._hidden.intersection(ids))
            logger.warning(
                "Completions have special tokens (%s) that are left out of the text which reward "
                "functions get; skip_special_tokens: false keeps them.",
                ", ".join(map(repr, tokens)),
            )
        return self.tokenizer.decode(ids, skip_special_tokens=True)
