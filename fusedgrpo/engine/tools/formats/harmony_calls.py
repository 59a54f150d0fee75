"""Calls of GPT-OSS: messages to functions, among messages of several channels."""

from __future__ import annotations

import re

from fusedgrpo.engine.tools.formats.base import CallFormat, Read, checked_call, closed, read_json

# A header may name the recipient before the channel, as templates write it, or behind it.
_CALL = re.compile(
    r"(?:<\|start\|>assistant|\A)?(?:<\|channel\|>commentary)?\s*to=functions\.(?P<name>[^\s<]+)"
    r"[^{}]*?<\|message\|>"
)
_MESSAGE = re.compile(
    r"(?:<\|start\|>assistant)?(?:<\|channel\|>(?P<channel>\w+)[^<]*<\|message\|>)?"
    r"(?P<text>.*?)(?:<\|end\|>|<\|return\|>|(?=<\|start\|>)|\Z)",
    re.DOTALL,
)


def _read_harmony(opened: re.Match[str]) -> Read:
    """Arguments in JSON, ``<|call|>``."""
    arguments, end = read_json(opened.string, opened.end())
    return [checked_call(opened["name"], arguments)], closed(opened.string, end, "<|call|>")


def _thoughts(text: str) -> tuple[str, str]:
    """The channel of analysis, and all others."""
    thoughts: list[str] = []
    content: list[str] = []
    for message in _MESSAGE.finditer(text):
        (thoughts if message["channel"] == "analysis" else content).append(message["text"])
    return "\n".join(filter(None, thoughts)), "".join(content)


HARMONY = CallFormat(
    "GPT-OSS",
    _CALL,
    _read_harmony,
    tuple(
        f"<|{mark}|>"
        for mark in ("start", "channel", "constrain", "message", "end", "call", "return")
    ),
    _thoughts,
)
