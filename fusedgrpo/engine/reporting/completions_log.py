"""``completions/step-NNNNNN.jsonl``: what the policy said in each rollout and what it got."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgrpo.engine.earlier_run import numbered
from fusedgrpo.engine.reporting.metrics_log import finite, steps_in_words, to_json_line
from fusedgrpo.engine.rewards.labels import unique_labels
from fusedgrpo.engine.rollout.types import Completion, Rollout

if TYPE_CHECKING:
    import torch


def completion_records(
    rollout: Rollout,
    *,
    prompts: Sequence[Any],
    names: Sequence[str],
    rewards: torch.Tensor,
    total: torch.Tensor,
    advantages: torch.Tensor | None = None,
    extra: Mapping[str, Sequence[Any]] | None = None,
) -> list[dict[str, Any]]:
    """One JSON-able record per completion, in the rollout's flat order.

    prompts: [B], as the reward functions got them. names: [F]. rewards: [B, F], NaN = None.
    total, advantages: [B]; None: they are not trained on, NaN: this one is not. extra: column ->
    [B], what the reward functions logged.
    """
    labels = unique_labels(names)
    columns = extra or {}
    rows = zip(
        rollout.completions(),
        rollout.group_ids,
        prompts,
        rewards.tolist(),
        total.tolist(),
        strict=True,
    )
    records = [
        {
            "group": group,
            "row": rollout.groups[group].row,
            "prompt": prompt,
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "length": completion.own_tokens,
            **_turns(completion),
            "rewards": dict(zip(labels, (none_if_nan(v) for v in values), strict=True)),
            "reward": none_if_nan(reward),
            "extra": {name: column[i] for name, column in columns.items()},
        }
        for i, (completion, group, prompt, values, reward) in enumerate(rows)
    ]
    if advantages is not None:
        for record, advantage in zip(records, advantages.tolist(), strict=True):
            record["advantage"] = none_if_nan(advantage)
    return records


def _turns(completion: Completion) -> dict[str, Any]:
    """The messages of a conversation with tools, which its text alone does not tell."""
    if completion.messages is None:
        return {}
    return {
        "conversation": list(completion.messages),
        "tool_calls": completion.calls,
        "tool_failures": completion.failures,
    }


def none_if_nan(value: float) -> float | None:
    return None if value != value else value


def scores_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The scores of a completion by name: reward, its parts, and the advantage if it has one."""
    scores = {"reward": record.get("reward"), **rewards_of(record)}
    if "advantage" in record:
        scores["advantage"] = record["advantage"]
    return {name: finite(value) for name, value in scores.items()}


def rewards_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The reward of each function by itself; none where a record, which others may have written,
    has no such object."""
    rewards = record.get("rewards")
    return rewards if isinstance(rewards, Mapping) else {}


def prompt_text(prompt: Any) -> str:
    """A prompt for people: the string itself, or the messages with their roles; of anything else
    that a file may have, its text, and nothing for none."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    if isinstance(prompt, Sequence) and all(isinstance(each, Mapping) for each in prompt):
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)
    return str(prompt)


def completion_text(record: Mapping[str, Any]) -> str:
    """A completion for people: its text, or, where it is a conversation, the messages with their
    roles and what they call."""
    messages = record.get("conversation")
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return prompt_text(record.get("completion"))
    return "\n".join(
        line for each in messages if isinstance(each, Mapping) for line in _message_lines(each)
    )


def _message_lines(message: Mapping[str, Any]) -> Iterable[str]:
    who = " ".join(str(message[key]) for key in ("role", "name") if message.get(key))
    if thoughts := message.get("reasoning_content"):
        yield f"{who} thinks: {thoughts}"
    calls = message.get("tool_calls") or []
    if message.get("content") or not calls:
        yield f"{who}: {message.get('content')}"
    for call in calls if isinstance(calls, Sequence) else []:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            arguments = json.dumps(function.get("arguments"), ensure_ascii=False, default=str)
            yield f"{who} calls {function.get('name')} {arguments}"


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
        beside; returns what there is to say. Raises OSError."""
        later = [number for number in self._steps() if number > step]
        if not later:
            return None
        aside = numbered(self.directory, "dropped")
        aside.mkdir()
        self._move_after(step, aside)
        return f"{self.directory.name}: what is of {steps_in_words(later)} was moved to {aside}."

    def _steps(self) -> Iterable[int]:
        return self.loose

    def _move_after(self, step: int, aside: Path) -> None:
        for number, path in self.loose.items():
            if number > step:
                path.rename(aside / path.name)

    @property
    def loose(self) -> dict[int, Path]:
        """The files of single steps, in order."""
        return steps_in(self.directory)


def steps_in(directory: str | Path) -> dict[int, Path]:
    """The ``step-NNNNNN.jsonl`` of ``directory`` by the steps that they are about, in order."""
    numbers = {path: path.stem.partition("-")[2] for path in Path(directory).glob("step-*.jsonl")}
    found = {int(number): path for path, number in numbers.items() if number.isdecimal()}
    return dict(sorted(found.items()))
