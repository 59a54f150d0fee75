"""The part of the report that shows the same held-out prompts before and after."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fusedgrpo.engine.reporting.completions_log import prompt_text, scores_of
from fusedgrpo.engine.reporting.formatting import number
from fusedgrpo.engine.reporting.held_out_log import Checks
from fusedgrpo.engine.reporting.judging.prompts import Compared, compared, counts

SHOWN = 12  # prompts, those that changed first
STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr } }
.lost, .worse { color: #dc2626 } .newly, .better { color: #059669 }
"""


def held_out_section(checks: Checks) -> str:
    """HTML; "" where there are not two checks with a prompt in common."""
    prompts = compared(checks)
    if not prompts:
        return ""
    words = ", ".join(f"{count} {status}" for status, count in counts(prompts).items())
    more = len(prompts) - SHOWN
    hidden = f'<p class="soft">{more} more are in held_out/.</p>' if more > 0 else ""
    return (
        f"<h2>Held-out prompts, before and after</h2>"
        f'<p class="soft">The most likely answer to each of {len(prompts)} prompts, step '
        f"{min(checks)} and step {max(checks)}: {escape(words)}.</p>"
        + "".join(_pair(one) for one in prompts[:SHOWN])
        + hidden
    )


def _pair(one: Compared) -> str:
    answers = "".join(
        f'<div class="said">{_answer(name, record)}</div>'
        for name, record in (("before", one.before), ("after", one.after))
    )
    return (
        f'<div class="card sample"><b class="{one.status.split()[0]}">{one.status}</b>'
        f' <span class="soft">row {escape(str(one.after.get("row")))}</span>'
        f"<pre>{escape(prompt_text(one.after.get('prompt') or ''))}</pre>"
        f'<div class="pair">{answers}</div></div>'
    )


def _answer(name: str, record: Mapping[str, Any]) -> str:
    tags = [f"{key} {number(value)}" for key, value in scores_of(record).items()]
    tags.append(f"{record.get('length')} tokens")
    return (
        f'<div class="soft">{name}: {escape(", ".join(tags))}</div>'
        f"<pre>{escape(str(record.get('completion')))}</pre>"
    )
