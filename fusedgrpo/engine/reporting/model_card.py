"""The model card of a run: what was trained on what, what came of it, and how to load it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import yaml

from fusedgrpo.engine.reporting.metrics_log import Row, finite

_PACKAGES = ("fusedgrpo", "torch", "transformers", "peft", "datasets")
_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""


def card_header(
    settings: Mapping[str, Any], *, dataset_name: str | None, tags: Sequence[str], adapter: bool
) -> dict[str, Any]:
    """The card's metadata, as the Hub reads it. settings: the options of the run."""
    return {
        "library_name": "peft" if adapter else "transformers",
        "base_model": settings["model_name_or_path"],
        "datasets": dataset_name,
        "pipeline_tag": "text-generation",
        "tags": [*dict.fromkeys([*tags, "grpo", "fusedgrpo", *(["lora"] if adapter else [])])],
    }


def model_card(
    header: Mapping[str, Any],
    settings: Mapping[str, Any],
    rows: Sequence[Row],
    *,
    name: str,
    steps: int,
    facts: Mapping[str, str],
) -> str:
    """The text of the card. rows: of metrics.jsonl. facts: lines of its table, by name."""
    shown = {key: value for key, value in header.items() if value is not None}
    table = {
        "Base model": settings["model_name_or_path"],
        **facts,
        "Learning rate": f"{settings['learning_rate']:g}, {settings['lr_scheduler_type']}",
        "Loss": f"{settings['loss_type']}, beta {settings['beta']:g}",
        "Seed": settings["seed"],
    }
    lines = [f"| {key} | {_cell(value)} |" for key, value in table.items() if value is not None]
    load = (_ADAPTER if header.get("library_name") == "peft" else _MODEL).format(name=name)
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}---",
            f"\n# {name}\n",
            "Trained with GRPO ([paper](https://arxiv.org/abs/2402.03300)) by fusedgrpo, "
            f"{steps} steps.\n",
            "| | |\n|---|---|",
            *lines,
            "\n## Reward\n",
            *_curve(rows),
            f"\n## Load\n\n```python\n{load}\n```",
            f"\n## Versions\n\n{_versions()}\n",
        ]
    )


def _curve(rows: Sequence[Row]) -> list[str]:
    """First, best and last reward, of training and of evaluation, as a table."""
    lines = []
    for metric in ("reward", "eval_reward"):
        points = [(row["step"], row[metric]) for row in rows if finite(row.get(metric)) is not None]
        if points:
            best = max(points, key=lambda point: point[1])
            cells = [f"{value:.4g} (step {step})" for step, value in (points[0], best, points[-1])]
            lines.append(f"| {metric} | {' | '.join(cells)} |")
    if not lines:
        return ["No step has a reward."]
    return ["| | first | best | last |\n|---|---|---|---|", *lines]


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            continue
    return ", ".join(found)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
