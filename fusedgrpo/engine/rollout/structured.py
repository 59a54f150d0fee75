"""Which tokens may be next in a completion that has to match something: ``structured_outputs``.

llguidance (an extra) follows what was said, in bytes, and fills a mask of the vocabulary. It does
so on the host, for all completions of a step at once, with as many threads as torch has.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.config.structured import StructuredOutputs, parsed_schema
from fusedgrpo.engine.rollout.warpers import only_allowed
from fusedgrpo.errors import ConfigError, SamplerError, brief, reason
from fusedgrpo.input_files import exists, read_text
from fusedgrpo.models.policy import Policy

log = logging.getLogger("fusedgrpo")

WHO = "structured_outputs"


class Grammar:
    """The form that completions have to match, compiled for a tokenizer.

    eos_ids: what ends a completion. They are allowed where the match is complete, and are the only
    ones where nothing can follow. vocabulary: tokens from here on are never allowed; None for all
    that the tokenizer has.

    Raises ConfigError for what the library cannot follow, and without it.
    """

    def __init__(
        self,
        asked: StructuredOutputs,
        tokenizer: Any,
        eos_ids: Sequence[int],
        vocabulary: int | None = None,
    ):
        self.asked = asked
        self._library = _library()
        own = 1 + max(tokenizer.get_vocab().values())
        size = max(own, vocabulary or 0)
        try:
            self.tokens = self._library.hf.from_tokenizer(
                tokenizer, n_vocab=size, eos_token=list(eos_ids) or None
            )
        except ValueError as error:
            raise ConfigError(
                f"{WHO}: llguidance does not know this tokenizer ({reason(error)}); it reads the "
                "fast ones of transformers that say how they decode."
            ) from error
        self._words = -(-size // 32)
        known = np.arange(32 * self._words) < (vocabulary or size)
        self._known = np.packbits(known, bitorder="little")
        # What ends a completion may be text to the library, and then an end in the midst of it.
        self._texts = [i for i in eos_ids if not self.tokens.is_special_token(i)]
        self._executor = self._library.LLExecutor(num_threads=host.threads())
        self._start = self._compiled()

    def _compiled(self) -> Any:
        kind = self.asked.kind
        try:
            text = self._library.grammar_from(kind, getattr(self.asked, kind))
        except ValueError as error:
            raise ConfigError(f"{WHO}: {kind}: {reason(error)}.") from error
        wrong, messages = self._library.LLMatcher.validate_grammar_with_warnings(text, self.tokens)
        said = "; ".join(" ".join(message.split()) for message in messages)
        if wrong:
            raise ConfigError(f"{WHO}: {kind}: {said}.")
        if said:
            log.warning("%s: %s: %s", WHO, kind, said)
        return self._library.LLMatcher(self.tokens, text, log_level=0)

    def matcher(self) -> Any:
        """One for a text that begins."""
        return self._start.deep_copy()

    def said(self, matcher: Any, token: int) -> None:
        """A token that was allowed was said. Raises SamplerError."""
        if not matcher.consume_token(token):
            raise SamplerError(f"{WHO}: {self.asked.kind}: {_first_line(matcher)}.")

    def allowed(self, matchers: Sequence[Any], device: torch.device) -> Tensor:
        """``[M, W]`` uint8 on ``device``: the tokens that may be next, as in ``only_allowed``.
        Raises SamplerError where there is none."""
        pinned = device.type == "cuda"
        words = torch.empty(len(matchers), self._words, dtype=torch.int32, pin_memory=pinned)
        filled = [(matcher, i) for i, matcher in enumerate(matchers)]
        self._library.numpy.fill_next_token_bitmask_par(self._executor, filled, words.numpy())
        bits = words.view(torch.uint8)
        array = bits.numpy()
        array &= self._known
        for i, matcher in enumerate(matchers):
            if matcher.is_error():
                raise SamplerError(
                    f"{WHO}: {self.asked.kind}: no token can follow ({_first_line(matcher)})."
                )
            if self._texts and not matcher.is_accepting():
                for token in self._texts:
                    array[i, token // 8] &= ~np.uint8(1 << token % 8)
        if not array.any(1).all():
            raise SamplerError(f"{WHO}: {self.asked.kind}: no token of the model's can follow.")
        return bits.to(device, non_blocking=True)

    def least_tokens(self) -> int:
        """Tokens that every match has at least, as the tokenizer would write it, with the end
        token: those of the shortest choice, else of what each of them begins with."""
        if self.asked.choice is not None:
            return 1 + min(len(self.tokens.tokenize_str(text)) for text in self.asked.choice)
        return 1 + len(self.tokens.tokenize_bytes(self.matcher().compute_ff_bytes()))


class MatchingTokens:
    """A logits processor of generate: the tokens with which each of ``rows`` goes on to match.

    over: whether a completion with these tokens has ended, so that what generate has it say is
    padding.
    """

    def __init__(self, grammar: Grammar, rows: int, over: Callable[[Sequence[int]], bool]):
        self.grammar = grammar
        self.over = over
        self.going = {i: grammar.matcher() for i in range(rows)}
        self.said = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.said:
            ids = input_ids[:, -self.said :].tolist()
            for i, matcher in self.going.items():
                self.grammar.said(matcher, ids[i][-1])
            self.going = {i: m for i, m in self.going.items() if not self.over(ids[i])}
        self.said += 1
        if not self.going:
            return scores
        bits = self.grammar.allowed(list(self.going.values()), scores.device)
        rows = torch.tensor(list(self.going), dtype=torch.int64, device=scores.device)
        masked = only_allowed(scores[rows], bits)
        sound = masked.amax(1).isfinite().tolist()
        # What is drawn from no distribution may be any token; that is said at the end.
        self.going = {i: m for (i, m), s in zip(self.going.items(), sound, strict=True) if s}
        return scores.index_copy(0, rows, masked)


def grammars(
    tokenizer: Any, eos_ids: Collection[int], policy: Policy
) -> Callable[[StructuredOutputs | None], Grammar | None]:
    """The grammar of what is asked for, compiled once; none where nothing is."""

    @functools.cache
    def compiled(asked: StructuredOutputs) -> Grammar:
        return Grammar(asked, tokenizer, tuple(eos_ids), policy.vocabulary_size)

    return lambda asked: None if asked is None else compiled(asked)


def settle_schema(args: GRPOConfig, folders: Sequence[Path]) -> None:
    """Put the schema of a file that ``json`` names into ``args``, for the record of the run.
    folders: where it is looked for, in this order. Raises ConfigError."""
    name = (args.structured_outputs or {}).get("json")
    if not isinstance(name, str):
        return
    paths = [folder / os.path.expanduser(name) for folder in folders]
    found = next((path for path in paths if exists(path)), None)
    if found is None:
        looked = ", ".join(map(str, paths))
        raise ConfigError(f"{WHO}: json: {brief(name)}: no such file (looked for {looked}).")
    text = read_text(found, ConfigError)
    try:
        schema = parsed_schema(text, f"json: {found}")
    except ValueError as error:
        raise ConfigError(f"{WHO}: {error}") from error
    args.structured_outputs = {"json": schema}


def check_structured(asked: StructuredOutputs, tokenizer: Any, most: int) -> None:
    """Raise ConfigError unless completions of ``most`` tokens can match: there is the library, it
    compiles what is asked for and knows the tokenizer, and what every match begins with fits."""
    eos = getattr(tokenizer, "eos_token_id", None)
    grammar = Grammar(asked, tokenizer, [] if eos is None else [eos])
    try:
        grammar.allowed([grammar.matcher()], torch.device("cpu"))
    except SamplerError as error:
        raise ConfigError(f"{error} Nothing matches.") from error
    if (needed := grammar.least_tokens()) > most:
        raise ConfigError(
            f"{WHO}: {asked.kind}: a match is at least {needed} tokens long with the end token, "
            f"and max_completion_length is {most}."
        )


def _first_line(matcher: Any) -> str:
    return matcher.get_error().partition("\n")[0] or "it has ended"


@functools.cache
def _library() -> Any:
    try:
        for part in ("hf", "numpy"):
            importlib.import_module(f"llguidance.{part}")
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ConfigError(
            f"{WHO} needs the package llguidance: pip install 'fusedgrpo[structured]' "
            f"({reason(error)})."
        ) from error
