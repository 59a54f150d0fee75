"""``completions/step-NNNNNN.jsonl``: what the policy said in each rollout and what it got."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgrpo.engine.earlier_run import numbered
from fusedgrpo.engine.reporting.metrics_log import finite, read_jsonl, to_json_line
from fusedgrpo.engine.rewards.labels import unique_labels
from fusedgrpo.engine.rollout.types import Rollout

if TYPE_CHECKING:
    import torch


def completion_records(
    rollout: Rollout,
    *,
    prompts: Sequence[Any],
    names: Sequence[str],
    rewards: torch.Tensor,
    total: torch.Tensor,
    advantages: torch.Tensor,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> list[dict[str, Any]]:
    """One JSON-able record per completion, in the rollout's flat order.

    prompts: [B], as the reward functions got them. names: [F]. rewards: [B, F], NaN = None.
    total, advantages: [B], NaN for none. extra: column -> [B], what the reward functions logged.
    """
    labels = unique_labels(names)
    columns = extra or {}
    rows = zip(
        rollout.completions(),
        rollout.group_ids,
        prompts,
        rewards.tolist(),
        total.tolist(),
        advantages.tolist(),
        strict=True,
    )
    return [
        {
            "group": group,
            "row": rollout.groups[group].row,
            "prompt": prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "length": len(completion.ids),
            "rewards": dict(zip(labels, (none_if_nan(v) for v in values), strict=True)),
            "reward": none_if_nan(reward),
            "advantage": none_if_nan(advantage),
            "extra": {name: column[i] for name, column in columns.items()},
        }
        for i, (completion, group, prompt, values, reward, advantage) in enumerate(rows)
    ]


def none_if_nan(value: float) -> float | None:
    return None if value != value else value


def scores_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores of a completion by name: reward, its parts, and the advantage if it has one."""
    scores = {"reward": record.get("reward"), **(record.get("rewards") or {})}
    if "advantage" in record:
        scores["advantage"] = record["advantage"]
    return {name: finite(value) for name, value in scores.items()}


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt for people: the string itself, or the messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


class CompletionsLog:
    """Writes one file per rollout into ``directory``, named after the step that sampled it."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def write(self, step: int, records: Sequence[Mapping[str, Any]]) -> Path:
        """Write the records of one rollout; the file is complete or not there. Raises OSError."""
        self.directory.mkdir(exist_ok=True)
        path = self.path_of(step)
        unfinished = path.with_name(f".{path.name}.tmp")
        # A prompt may hold half a surrogate pair, which UTF-8 cannot; it becomes "?".
        with unfinished.open("w", encoding="utf-8", errors="replace") as file:
            file.writelines(to_json_line({"step": step, **record}) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        return path

    def path_of(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}.jsonl"

    def drop_after(self, step: int) -> str | None:
        """Put the files of later steps, which a resumed run is going to sample again, into a folder
        beside; returns what there is to say."""
        later = [path for path in self.directory.glob("step-*.jsonl") if _step_of(path) > step]
        if not later:
            return None
        aside = numbered(self.directory, "dropped")
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        return f"Completions of {len(later)} rollouts after step {step} were moved to {aside}."


def _step_of(path: Path) -> int:
    number = path.stem.partition("-")[2]
    return int(number) if number.isdecimal() else 0


def steps_in(directory: str | Path) -> dict[int, Path]:
    """The files of ``directory`` by the steps that they are about, in order."""
    paths = sorted(Path(directory).glob("step-*.jsonl"), key=_step_of)
    return {_step_of(path): path for path in paths}


def first_and_last(directory: str | Path) -> list[list[dict[str, Any]]]:
    """The records of the first and the last rollout in ``directory`` (none, one or two lists)."""
    paths = list(steps_in(directory).values())
    return [read_jsonl(path) for path in (paths if len(paths) < 2 else (paths[0], paths[-1]))]
