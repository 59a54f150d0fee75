"""Docstrings begin with what a thing is or does."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "fusedgrpo"
KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def test_no_docstring_begins_with_half_a_sentence() -> None:
    wrong = []
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, KINDS) else None
            if text and text.split()[0] in ("Of", "What", "Those"):
                wrong.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)
