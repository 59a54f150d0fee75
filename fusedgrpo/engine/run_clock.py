"""The date that chat templates are told: that of the run's start, also when it is resumed later."""

from __future__ import annotations

import string
from dataclasses import dataclass
from datetime import datetime
from typing import Any

# transformers makes text of functions that are given to a template, so that a ``strftime_now`` of
# our own has to be written in Jinja. The last tag keeps the white space that the template begins
# with.
_MACRO = (
    "{%- macro strftime_now(form) -%}{%- set made = namespace(text=form) -%}"
    "{%- for directive, text in fusedgrpo_started.items() -%}"
    "{%- set made.text = made.text.replace(directive, text) -%}"
    "{%- endfor -%}{{ made.text }}{%- endmacro -%}{{ '' }}"
)


@dataclass(slots=True)
class RunClock:
    """started: when the run was started, not resumed; part of every checkpoint."""

    started: datetime

    def pinned(self, chat_template: Any) -> dict[str, Any]:
        """Arguments of ``apply_chat_template`` by which ``strftime_now`` tells the start.

        None for a template that does not ask for it.
        """
        if not is_dated(chat_template):
            return {}
        directives = [f"%{flag}{c}" for flag in ("-", "") for c in string.ascii_letters]
        texts = {"%%": "\0"} | {d: self.started.strftime(d) for d in directives} | {"\0": "%"}
        return {"chat_template": _MACRO + chat_template, "fusedgrpo_started": texts}


def is_dated(chat_template: Any) -> bool:
    """Whether a chat template asks for the date."""
    return isinstance(chat_template, str) and "strftime_now" in chat_template
