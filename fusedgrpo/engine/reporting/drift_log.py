"""``drift/step-NNNNNN.jsonl``: log-probs of a few completions before and after an update, by step.

A record is one completion: ``rollout`` and ``completion`` say which (the step that sampled it, and
its place in ``completions/`` of that step), ``tokens`` are texts, and ``before``, ``after`` and
``reference`` their log-probs, or null where they are not known. ``given`` are the spans of tokens
that the policy did not write.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fusedgrpo.engine.reporting.completions_log import steps_in
from fusedgrpo.engine.reporting.metrics_log import Row, finite, read_jsonl

logger = logging.getLogger("fusedgrpo")

Drift = Mapping[int, Sequence[Mapping[str, Any]]]  # step -> records

_LIMIT = 20.0  # of a log-ratio, as in the loss


def read_drift(directory: str | Path) -> Drift:
    """The records of every check in ``directory``, in order of their steps; what is none is left
    out with a warning."""
    found = {}
    for step, path in steps_in(directory).items():
        records = read_jsonl(path)
        found[step] = [record for record in records if _is_whole(record)]
        if others := len(records) - len(found[step]):
            logger.warning("%s: %d records are none of a check and left out", path, others)
    return found


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether it has tokens, and of the log-probs that it has one for each of them."""
    tokens = record.get("tokens")
    given = [record[key] for key in ("before", "after", "reference") if record.get(key) is not None]
    return isinstance(tokens, list) and all(
        isinstance(values, list) and len(values) == len(tokens) for values in given
    )


def drift_rows(drift: Drift) -> list[dict[str, Any]]:
    """``{"step", "kl"}`` of each check that has it: the mean over all its tokens of the estimate
    that the metric ``kl`` is of, exp(d) - d - 1 with d = reference - after (k3 of Schulman,
    "Approximating KL divergence", joschu.net/blog/kl-approx.html)."""
    rows = []
    for step, records in sorted(drift.items()):
        found = [k3 for record in records for k3 in _k3(record)]
        if found:
            rows.append({"step": step, "kl": fmean(found)})
    return rows


def with_measured_kl(rows: Sequence[Row], drift: Drift) -> tuple[list[dict[str, Any]], bool]:
    """``rows``, with the KL of the checks in those of their steps where none has one of its own;
    and whether it is that."""
    own = [dict(row) for row in rows]
    if any("kl" in row for row in own):
        return own, False
    measured = {row["step"]: row["kl"] for row in drift_rows(drift)}
    for row in own:
        if row["step"] in measured:
            row["kl"] = measured[row["step"]]
    return own, any("kl" in row for row in own)


def pushes(record: Mapping[str, Any]) -> list[float] | None:
    """For each token of a record, by how much the update changed its log-prob, times the advantage:
    above 0 where it went the way that it was told to. NaN for a token without either; None if
    nothing was measured before the update."""
    before, after = record.get("before"), record.get("after")
    advantage = finite(record.get("advantage"))
    if before is None or after is None or advantage is None:
        return None
    return [
        math.nan if b is None or a is None else advantage * (a - b)
        for b, a in zip(map(finite, before), map(finite, after), strict=True)
    ]


def _k3(record: Mapping[str, Any]) -> Iterator[float]:
    reference, after = record.get("reference"), record.get("after")
    if reference is None or after is None:
        return
    for r, a in zip(map(finite, reference), map(finite, after), strict=True):
        if r is not None and a is not None:
            d = max(-_LIMIT, min(r - a, _LIMIT))
            yield math.expm1(d) - d
