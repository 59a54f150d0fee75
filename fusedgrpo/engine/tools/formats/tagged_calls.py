"""Calls in tags, with arguments as bare text: Qwen3-Coder, Qwen3.5 and Nemotron 3; GLM-4.5."""

from __future__ import annotations

import re

from fusedgrpo.engine.tools.formats.base import (
    CallFormat,
    Read,
    UnreadableCallError,
    checked_call,
    closed,
    past_space,
)

_FUNCTION = re.compile(r"([^<>\n]+)>")
# Text may have the closing tag in it: one counts if the call goes on behind it.
_PARAMETER = re.compile(
    r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>))",
    re.DOTALL,
)


def _read_function(opened: re.Match[str]) -> Read:
    """The name and ``>``, a ``<parameter=..>`` for each argument, ``</function></tool_call>``."""
    text = opened.string
    named = _FUNCTION.match(text, opened.end())
    if named is None or not opened[0].endswith("="):
        raise UnreadableCallError("expected <function=..> with the name of a tool")
    arguments, end = {}, named.end()
    while parameter := _PARAMETER.match(text, end):
        arguments[parameter[1].strip()] = parameter[2]
        end = parameter.end()
    end = past_space(text, end)
    if not text.startswith("</function>", end):
        found = text[end : end + 20]
        raise UnreadableCallError(
            f"expected </function>, or <parameter=..> with its </parameter>, found {found!r}"
        )
    return [checked_call(named[1], arguments)], closed(
        text, end + len("</function>"), "</tool_call>"
    )


_NAME = re.compile(r"\s*([^\s<>{}\[\]\"]+)\s*(?=<arg_key>|</tool_call>|\Z)")
_ARGUMENT = re.compile(
    r"\s*<arg_key>([^<]*)</arg_key>\s*<arg_value>(.*?)</arg_value>"
    r"(?=\s*(?:<arg_key>|</tool_call>|\Z))",
    re.DOTALL,
)


def _read_glm(opened: re.Match[str]) -> Read:
    """The name, ``<arg_key>`` and ``<arg_value>`` of each argument, ``</tool_call>``."""
    text = opened.string
    named = _NAME.match(text, opened.end())
    if named is None:
        raise UnreadableCallError("expected the name of a tool behind <tool_call>, then <arg_key>")
    arguments, end = {}, named.end()
    while argument := _ARGUMENT.match(text, end):
        arguments[argument[1].strip()] = argument[2]
        end = argument.end()
    return [checked_call(named[1], arguments)], closed(text, end, "</tool_call>")


TAGGED = CallFormat(
    "Qwen3-Coder",
    re.compile(r"(?:<tool_call>\s*)?<function=|<tool_call>"),
    _read_function,
    ("<tool_call>", "</tool_call>"),
)
GLM = CallFormat(
    "GLM",
    re.compile("<tool_call>"),
    _read_glm,
    ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
