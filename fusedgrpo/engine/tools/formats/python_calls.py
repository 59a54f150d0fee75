"""Calls in Python's syntax: LFM2."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from fusedgrpo.engine.tools.formats.base import (
    CallFormat,
    Read,
    UnreadableCallError,
    checked_call,
)
from fusedgrpo.engine.tools.types import ToolCall

_OPEN, _CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
_WORDS = {"true": True, "false": False, "null": None}  # JSON's names of Python's constants


def _read_python(opened: re.Match[str]) -> Read:
    """``[name(argument=value, ..), ..]`` with literal values, ``<|tool_call_end|>``."""
    text = opened.string
    end = text.find(_CLOSE, opened.end())
    end, after = (len(text), len(text)) if end < 0 else (end, end + len(_CLOSE))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings that are not ours
            tree = ast.parse(text[opened.end() : end].strip(), mode="eval").body
        written = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_call(one) for one in written], after
    except UnreadableCallError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deeply"
        raise UnreadableCallError(f"the call is not valid: {said}") from None


def _call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise UnreadableCallError("expected a list of calls, [name(argument=value)]")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise UnreadableCallError("arguments need their names, [name(argument=value)]")
    arguments = {str(each.arg): _value(each.value) for each in node.keywords}
    return checked_call(ast.unparse(node.func), arguments)


def _value(node: ast.expr) -> Any:
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id not in _WORDS:
            raise UnreadableCallError(f"{each.id} is no value; text needs quotes")
    return ast.literal_eval(_Constants().visit(node))


class _Constants(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id])


PYTHON = CallFormat("LFM2", re.compile(re.escape(_OPEN)), _read_python, (_OPEN, _CLOSE))
