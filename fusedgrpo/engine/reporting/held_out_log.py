"""``held_out/step-NNNNNN.jsonl``: the most likely answers to held-out prompts, by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fusedgrpo.engine.reporting.completions_log import rewards_of, steps_in
from fusedgrpo.engine.reporting.metrics_log import finite, read_jsonl

GREEDY = "greedy"  # in the names of their metrics, after the set's

Checks = Mapping[int, Sequence[Mapping[str, Any]]]  # step -> records


def read_checks(directory: str | Path) -> Checks:
    """The records of every check in ``directory``, in order of their steps."""
    return {step: read_jsonl(path) for step, path in steps_in(directory).items()}


def sets_of(checks: Checks) -> list[str]:
    """The sets of prompts, "" for one without a name, in order of appearance."""
    names = (set_of(record) for records in checks.values() for record in records)
    return list(dict.fromkeys(names))


def rewards_by_prompt(
    checks: Checks, name: str, part: str | None = None
) -> dict[int, dict[int, float]]:
    """Step -> row of the data -> reward, of one set; or what one reward function gave, its
    ``part``."""

    def reward_of(record: Mapping[str, Any]) -> float | None:
        return finite(record.get("reward") if part is None else rewards_of(record).get(part))

    return {
        step: {
            record["row"]: value
            for record in records
            if set_of(record) == name
            and isinstance(record.get("row"), int)
            and (value := reward_of(record)) is not None
        }
        for step, records in checks.items()
    }


def set_of(record: Mapping[str, Any]) -> str:
    """The set that a record's prompt is of, "" for one without a name."""
    return str(record.get("set") or "")


def check_rows(checks: Checks) -> list[dict[str, Any]]:
    """The means of each check, named like those of an evaluation (``eval_greedy_reward``)."""
    rows = []
    for step, records in sorted(checks.items()):
        row: dict[str, Any] = {"step": step}
        for name in sets_of({step: records}):
            of_set = [record for record in records if set_of(record) == name]
            before = f"eval_{name}_{GREEDY}_" if name else f"eval_{GREEDY}_"
            rewards = [rewards_of(record) for record in of_set]
            means = {"reward": _mean(record.get("reward") for record in of_set)} | {
                f"rewards/{key}/mean": _mean(each.get(key) for each in rewards)
                for key in dict.fromkeys(key for each in rewards for key in each)
            }
            row |= {before + key: mean for key, mean in means.items() if mean is not None}
        rows.append(row)
    return rows


def _mean(values: Iterable[Any]) -> float | None:
    known = [v for value in values if (v := finite(value)) is not None]
    return fmean(known) if known else None
