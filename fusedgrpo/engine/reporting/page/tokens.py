"""One completion, its tokens coloured by what an update did to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedgrpo.engine.reporting.completions_log import prompt_text
from fusedgrpo.engine.reporting.drift_log import Drift, pushes
from fusedgrpo.engine.reporting.formatting import escaped, number
from fusedgrpo.engine.reporting.metrics_log import finite

SHOWN = 4  # completions of a step
LEVELS = 3  # of a colour
MOST_TOKENS = 600


@dataclass(frozen=True)
class Token:
    """kind: the class of its colour, "" for none. title: its numbers."""

    text: str
    kind: str
    title: str


@dataclass(frozen=True)
class ColouredCompletion:
    """more: tokens that are left out at its end."""

    prompt: str
    words: str
    tokens: list[Token]
    more: int


def coloured(drift: Drift) -> list[tuple[int, list[ColouredCompletion]]]:
    """Some completions of the first and of the last check of an update that did something to them,
    with the steps; those with the greatest advantages in size."""
    known = {
        step: [record for record in records if any(p for p in pushes(record) or [] if p == p)]
        for step, records in drift.items()
    }
    steps = [step for step, records in known.items() if records]
    found = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        chosen = sorted(known[step], key=lambda r: -abs(finite(r.get("advantage")) or 0.0))[:SHOWN]
        found.append((step, _one_scale(chosen)))
    return found


def _one_scale(records: Sequence[Mapping[str, Any]]) -> list[ColouredCompletion]:
    """The tokens of all ``records`` in colours of one scale, that of their greatest pushes but for
    a twentieth."""
    each = [pushes(record) or [] for record in records]
    sizes = sorted(abs(push) for values in each for push in values if push == push)
    top = sizes[int(0.95 * (len(sizes) - 1))] if sizes else 0.0
    return [
        _one(record, values, top or math.inf) for record, values in zip(records, each, strict=True)
    ]


def _one(record: Mapping[str, Any], values: Sequence[float], top: float) -> ColouredCompletion:
    before, after = record["before"], record["after"]
    given = _given(record)
    tokens = [
        Token(escaped(str(text)), "given", "said to the policy, not by it")
        if place in given
        else Token(
            escaped(str(text)),
            _kind(push, top),
            f"log-prob {_shown(b)} before, {_shown(a)} after; x advantage: {_shown(push)}",
        )
        for place, (text, push, b, a) in enumerate(
            zip(record["tokens"], values, before, after, strict=True)
        )
    ]
    words = f"reward {number(finite(record.get('reward')))}, "
    words += f"advantage {number(finite(record.get('advantage')))}"
    prompt = prompt_text(record.get("prompt"))
    return ColouredCompletion(
        prompt, words, tokens[:MOST_TOKENS], max(0, len(tokens) - MOST_TOKENS)
    )


def _given(record: Mapping[str, Any]) -> set[int]:
    """The places of tokens that the policy did not write, such as answers of tools."""
    spans = record.get("given")
    if not isinstance(spans, list):
        return set()
    return {
        place
        for span in spans
        if isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)
        for place in range(span[0], min(span[1], len(record["tokens"])))
    }


def _kind(push: float, top: float) -> str:
    if push != push or not push:
        return ""
    level = min(LEVELS, math.ceil(LEVELS * abs(push) / top)) if top < math.inf else 0
    if not level or abs(push) < 0.05 * top:
        return ""
    return f"{'up' if push > 0 else 'down'}{level}"


def _shown(value: Any) -> str:
    found = finite(value)
    return "?" if found is None else f"{found:+.3g}"
