"""Several runs on one page: what differs, what is paired, and what is a series of seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fusedgrpo.engine.reporting.judging import several
from fusedgrpo.engine.reporting.runs_page import write_runs_page
from fusedgrpo.errors import DataError
from tests.helpers.synthetic_runs import rise, run


def make(path: Path, seed: int, top: float, *, gained: float = 0.0, **options: Any) -> Path:
    (path / "held_out").mkdir(parents=True)
    rows = run(seed, rise(0.2, top), steps=40)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"output_dir": str(path), "seed": seed, "learning_rate": 1e-5} | options
    (path / "config.resolved.yaml").write_text(yaml.safe_dump(config))
    draw = np.random.default_rng(seed)
    records = [
        {"row": i, "prompt": f"<{i}>", "reward": i / 50 + gained + draw.normal(0, 0.01)}
        for i in range(50)
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (path / "held_out/step-000040.jsonl").write_text(text)
    return path


def test_a_page_of_three_runs(tmp_path: Path) -> None:
    paths = [
        make(tmp_path / "a/1", 1, 0.5),
        make(tmp_path / "a/2", 2, 0.5),
        make(tmp_path / "<b>", 3, 0.8, gained=0.1, learning_rate=3e-5),
    ]
    runs = several.read_runs(paths)
    assert [one.name for one in runs] == ["a/1", "a/2", "<b>"]
    assert several.differing(runs) == {"seed": [1, 2, 3], "learning_rate": [1e-5, 1e-5, 3e-5]}
    assert [len(group) for group in several.by_series(runs)] == [2, 1]
    same, better = several.difference(runs[0], runs[1]), several.difference(runs[0], runs[2])
    assert same is not None and not same.is_sure and same.prompts == 50
    # Prompt by prompt, a tenth stands out of rewards from 0 to 1.
    assert better is not None and better.is_sure and abs(better.size - 0.1) < better.margin < 0.02

    text = write_runs_page(paths, tmp_path / "out/page.html").read_text()
    parts = ["Options that differ", "learning_rate", "How they came out", "On the same", "Curves"]
    main = text[text.index("<main") : text.index("</main>")]
    assert [main.index(part) for part in parts] == sorted(main.index(part) for part in parts)
    assert "&lt;b&gt;" in main and "<b>" not in main
    assert "better" in text and "\\u003cb\\u003e" in text  # as JSON in a script writes it


def test_the_band_is_over_the_steps_that_all_have(tmp_path: Path) -> None:
    runs = several.read_runs([make(tmp_path / str(seed), seed, 0.5) for seed in (1, 2, 3)])
    del runs[0].rows[-5:]
    found = several.band(runs, "reward")
    assert found is not None and found.steps == list(range(1, 36))
    values = [next(row["reward"] for row in one.rows if row["step"] == 7) for one in runs]
    assert found.mean[6] == pytest.approx(np.mean(values))
    assert found.spread[6] == pytest.approx(np.std(values, ddof=1))
    assert several.band(runs, "kl") is None


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "a", 1, 0.5)
    with pytest.raises(DataError, match="is named twice"):
        write_runs_page([made, made], tmp_path / "x.html")
    with pytest.raises(DataError, match="has no rows"):
        write_runs_page([made, tmp_path], tmp_path / "x.html")
