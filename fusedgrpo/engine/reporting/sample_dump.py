"""The samples of a step that went wrong, in a file to study."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fusedgrpo.engine.reporting.metrics_log import to_json_line
from fusedgrpo.engine.rollout.training_sample import TrainingSample


def dump_samples(
    path: Path, samples: Sequence[TrainingSample], *, decode: Callable[[Any], str], **facts: Any
) -> Path:
    """Write the samples of a step that went wrong, with ``facts``, so that it can be studied."""
    rows = []
    for sample in samples:
        row: dict[str, Any] = {"completion": decode(sample.completion_ids)}
        for field in dataclasses.fields(sample):
            value = getattr(sample, field.name)
            row[field.name] = value.tolist() if isinstance(value, Tensor) else value
        rows.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json_line(facts | {"samples": rows}), encoding="utf-8")
    return path
