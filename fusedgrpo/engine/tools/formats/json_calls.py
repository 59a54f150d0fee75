"""Calls in JSON: Hermes and Qwen, Llama, Mistral, DeepSeek."""

from __future__ import annotations

import re

from fusedgrpo.engine.tools.formats.base import (
    CallFormat,
    Read,
    UnreadableCallError,
    call_of,
    checked_call,
    closed,
    past_space,
    read_json,
)


def _read_hermes(opened: re.Match[str]) -> Read:
    """``{"name": .., "arguments": ..}</tool_call>``"""
    value, end = read_json(opened.string, opened.end())
    return [call_of(value)], closed(opened.string, end, "</tool_call>")


def _read_llama(opened: re.Match[str]) -> Read:
    """``{"name": .., "parameters": ..}``, several with ``;`` between them, to the end."""
    text, end = opened.string, opened.end()
    calls = []
    while True:
        value, end = read_json(text, end)
        calls.append(call_of(value))
        end = past_space(text, end)
        if end == len(text):
            return calls, end
        if text[end] != ";":
            raise UnreadableCallError(f"text follows the call: {text[end : end + 20]!r}")
        end = past_space(text, end + 1)
        if end == len(text):
            return calls, end


_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]")


def _read_mistral(opened: re.Match[str]) -> Read:
    """A list of ``{"name": .., "arguments": ..}``, or of one the name, ``[ARGS]``, arguments."""
    text = opened.string
    if named := _NAMED.match(text, opened.end()):
        arguments, end = read_json(text, named.end())
        return [checked_call(named[1], arguments)], end
    value, end = read_json(text, opened.end())
    return [call_of(one) for one in (value if isinstance(value, list) else [value])], end


_DEEPSEEK = {
    name: f"<｜tool▁{mark}｜>"
    for name, mark in {
        "calls": "calls▁begin",
        "call": "call▁begin",
        "separator": "sep",
        "call end": "call▁end",
        "calls end": "calls▁end",
    }.items()
}
_DEEPSEEK_NAME = re.compile(
    rf"\s*(?:function\s*{_DEEPSEEK['separator']})?\s*([^\s<{{]+)\s*"
    rf"(?:```json\s|{_DEEPSEEK['separator']})"
)


def _read_deepseek(opened: re.Match[str]) -> Read:
    """Type and name before arguments in a block of code, or a name before bare arguments."""
    text = opened.string
    named = _DEEPSEEK_NAME.match(text, opened.end())
    if named is None:
        raise UnreadableCallError(
            "expected the name of a tool, and its arguments in JSON behind it"
        )
    arguments, end = read_json(text, named.end())
    if "```" in named[0]:
        end = closed(text, end, "```")
    call = checked_call(named[1], arguments)
    end = closed(text, end, _DEEPSEEK["call end"])
    after = past_space(text, end)
    return [call], after + len(_DEEPSEEK["calls end"]) if text.startswith(
        _DEEPSEEK["calls end"], after
    ) else end


HERMES = CallFormat(
    "Hermes", re.compile("<tool_call>"), _read_hermes, ("<tool_call>", "</tool_call>")
)
# An answer may be JSON, too: without a mark, a call has both keys.
LLAMA = CallFormat(
    "Llama",
    re.compile(
        r'\A\s*(?:<\|python_tag\|>|(?=\{)(?=.*"name"\s*:)(?=.*"(?:parameters|arguments)"\s*:))',
        re.DOTALL,
    ),
    _read_llama,
    ("<|python_tag|>",),
)
MISTRAL = CallFormat(
    "Mistral",
    re.compile(r"\[TOOL_CALLS\]"),
    _read_mistral,
    ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
)
DEEPSEEK = CallFormat(
    "DeepSeek",
    re.compile(rf"(?:{_DEEPSEEK['calls']}\s*)?{_DEEPSEEK['call']}"),
    _read_deepseek,
    tuple(_DEEPSEEK.values()),
)
