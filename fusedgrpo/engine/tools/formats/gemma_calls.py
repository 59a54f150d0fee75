"""Calls of Gemma 4: like JSON, with bare keys and quotes of its own."""

from __future__ import annotations

import re
from typing import Any

from fusedgrpo.engine.data.rows import DEEPEST
from fusedgrpo.engine.tools.formats.base import (
    CallFormat,
    Read,
    UnreadableCallError,
    checked_call,
    closed,
    past_space,
)

_OPEN, _CLOSE, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_NAME = re.compile(r"\s*call:\s*([^\s{}]+)\s*(?=\{)")
_KEY = re.compile(r"\s*([^\s:{}\[\],]+)\s*:")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_WORD = re.compile("|".join(_WORDS))
_DIGITS = 4000  # Python reads no longer integers


def _read_gemma(opened: re.Match[str]) -> Read:
    """``call:name{key:value,..}<tool_call|>``"""
    text = opened.string
    named = _NAME.match(text, opened.end())
    if named is None:
        raise UnreadableCallError("expected call:name{..}")
    arguments, end = _value(text, named.end(), 0)
    return [checked_call(named[1], arguments)], closed(text, end, _CLOSE)


def _value(text: str, start: int, depth: int) -> tuple[Any, int]:
    start = past_space(text, start)
    if depth > DEEPEST:
        raise UnreadableCallError("the arguments are nested too deeply")
    if text.startswith(_QUOTE, start):
        inside = start + len(_QUOTE)
        end = text.find(_QUOTE, inside)
        if end < 0:
            raise UnreadableCallError(f"text is not closed with {_QUOTE}")
        return text[inside:end], end + len(_QUOTE)
    if text.startswith("{", start):
        return _items(text, start + 1, depth, "}")
    if text.startswith("[", start):
        return _items(text, start + 1, depth, "]")
    if word := _WORD.match(text, start):
        return _WORDS[word[0]], word.end()
    if (number := _NUMBER.match(text, start)) and len(number[0]) < _DIGITS:
        whole = number[0].lstrip("-").isdigit()
        return int(number[0]) if whole else float(number[0]), number.end()
    found = text[start : start + 20]
    raise UnreadableCallError(f"expected a value, with {_QUOTE} around text, found {found!r}")


def _items(text: str, at: int, depth: int, close: str) -> tuple[Any, int]:
    """The mapping or list of which the first item begins at ``at``, and where it ends."""
    keyed = close == "}"
    keys: list[str] = []
    values: list[Any] = []
    while not text.startswith(close, at := past_space(text, at)):
        if values:
            if not text.startswith(",", at):
                raise UnreadableCallError(f"expected , or {close} at {text[at : at + 20]!r}")
            at += 1
        if keyed:
            key = _KEY.match(text, at)
            if key is None:
                raise UnreadableCallError(f"expected key:value at {text[at : at + 20]!r}")
            keys.append(key[1].removeprefix(_QUOTE).removesuffix(_QUOTE))
            at = key.end()
        value, at = _value(text, at, depth + 1)
        values.append(value)
    return dict(zip(keys, values, strict=True)) if keyed else values, at + 1


GEMMA = CallFormat("Gemma", re.compile(re.escape(_OPEN)), _read_gemma, (_OPEN, _CLOSE, _QUOTE))
