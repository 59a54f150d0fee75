"""How families of models write calls of tools: a ``CallFormat`` and a line in ``FORMATS`` each."""

from __future__ import annotations

from fusedgrpo.engine.tools.formats.base import CallFormat, UnreadableCallError, checked_call
from fusedgrpo.engine.tools.formats.gemma_calls import GEMMA
from fusedgrpo.engine.tools.formats.harmony_calls import HARMONY
from fusedgrpo.engine.tools.formats.json_calls import DEEPSEEK, HERMES, LLAMA, MISTRAL
from fusedgrpo.engine.tools.formats.python_calls import PYTHON
from fusedgrpo.engine.tools.formats.tagged_calls import GLM, TAGGED

__all__ = ["FORMATS", "CallFormat", "UnreadableCallError", "checked_call"]

FORMATS = (HERMES, TAGGED, GLM, LLAMA, MISTRAL, DEEPSEEK, GEMMA, HARMONY, PYTHON)
