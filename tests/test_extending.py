"""The blocks of docs/extending.md run, and do what is said about them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import tiny
from yaml import safe_load

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics

TEXT = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


def block(name: str) -> dict[str, Any]:
    """What the block that defines ``name`` defines."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if name in code]
    names: dict[str, Any] = {"__name__": name}
    exec(code, names)
    return names


def train(
    directory: Path, data: Any = None, options: dict[str, Any] | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    options = {"num_generations": 2, "prompts_per_step": 1, "max_steps": 2} | (options or {})
    trainer = GRPOTrainer(
        model=tiny.model(),
        args=GRPOConfig(
            output_dir=str(directory), max_completion_length=4, bf16=False, use_cpu=True, **options
        ),
        train_dataset=data or [{"prompt": "w4 w5 w6", "solution": s} for s in ("w7", None)],
        tokenizer=tiny.tokenizer(template=True),
        **{"reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}
        | arguments,
    )
    trainer.train()
    return read_metrics(directory / "metrics.jsonl")


def test_rewards(tmp_path: Path) -> None:
    code = block("right_unless_unknown")
    given = code["right_unless_unknown"](["w7 w8", "w8", "x"], ["w7", "w7", None])
    assert given == [1.0, 0.0, None]
    rows = train(tmp_path, reward_funcs=[code["short"], code["right_unless_unknown"]])
    assert rows[0]["rewards/short/mean"] == 1


def test_a_callback(tmp_path: Path) -> None:
    callback = block("Longest")["Longest"](tmp_path / "longest.jsonl")
    train(tmp_path / "run", callbacks=[callback])
    said = [json.loads(line) for line in (tmp_path / "longest.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [1, 2] and "completion" in said[0]


def test_a_sampler(tmp_path: Path) -> None:
    sampler = block("Parrot")["Parrot"](None, tiny.tokenizer(), [tiny.EOS])
    rows = train(tmp_path, sampler=sampler)
    assert rows[0]["completions/max_length"] <= 3 and rows[0]["completions/clipped_ratio"] == 1
    assert sampler.updates == 2
    first = sampler.sample([[4, 5, 6]], 3, GRPOSampling(), seed=1, first=1)
    both = sampler.sample([[7], [4, 5, 6]], 3, GRPOSampling(), seed=1)
    assert first[0].completions == both[1].completions


def test_a_sampler_by_its_name(tmp_path: Path) -> None:
    (yaml,) = re.findall(r"```yaml\n(sampler: .*?)```", TEXT, re.S)
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "Parrot" in code]
    (tmp_path / "parrot.py").write_text(code)
    named = train(tmp_path / "named", options=safe_load(yaml), search_paths=[tmp_path])
    passed = block("Parrot")["Parrot"](None, tiny.tokenizer(), [])
    rows = train(tmp_path / "passed", sampler=passed)
    for name in ("reward", "completions/mean_length", "loss"):
        assert [row[name] for row in named] == [row[name] for row in rows]


class GRPOSampling:
    max_new_tokens = 4


def test_data(tmp_path: Path) -> None:
    data = block("from_questions")["train_dataset"]
    assert len(train(tmp_path, data=[row | {"solution": "w7"} for row in data])) == 2


def test_every_file_that_is_named_is_there() -> None:
    root = Path(__file__).parents[1]
    paths = re.findall(r"`((?:engine|kernels|tests|bench|docs)/[\w/.]+)`", TEXT)
    assert len(paths) > 5
    for path in paths:
        assert (root / path).exists() or (root / "fusedgrpo" / path).exists(), path
