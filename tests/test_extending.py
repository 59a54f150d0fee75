"""The blocks of docs/extending.md run, and do what is said about them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

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
    directory: Path, options: dict[str, Any] | None = None, **arguments: Any
) -> list[dict[str, Any]]:
    """The metrics of a run. options: with a ``dataset``, which is trained on then."""
    some = [{"prompt": "w4 w5 w6", "solution": s} for s in ("w7", None)]
    sizes: dict[str, Any] = {"num_generations": 2, "prompts_per_step": 1, "max_steps": 2}
    trainer = GRPOTrainer(
        model=tiny.model(),
        args=GRPOConfig(
            output_dir=str(directory),
            max_completion_length=4,
            bf16=False,
            use_cpu=True,
            **sizes | (options or {}),
        ),
        train_dataset=None if "dataset" in (options or {}) else some,
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


def written(directory: Path, name: str) -> str:
    """The block that defines ``name`` as a file; what names it in a configuration."""
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", TEXT, re.S) if f"def {name}" in c]
    file = directory / f"{name}_file.py"
    file.write_text(code)
    return f"{file}:{name}"


def test_a_loss(tmp_path: Path) -> None:
    options = {"loss_type": written(tmp_path, "tempered"), "num_iterations": 2}
    rows = train(
        tmp_path / "run",
        options | {"learning_rate": 0.1},
        reward_funcs=lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids],
    )
    assert rows[0]["tempered/weight"] == 1 and 0 < rows[1]["tempered/weight"] < 1


def test_an_advantage_estimator(tmp_path: Path) -> None:
    options = {"advantage_estimator": written(tmp_path, "leave_one_out")}
    assert len(train(tmp_path / "run", options)) == 2
    total, groups = torch.tensor([1.0, 0.0, 5.0, torch.nan]), torch.tensor([0, 0, 1, 1])
    found = block("leave_one_out")["leave_one_out"](total=total, group_ids=groups)
    assert found.tolist() == [1.0, -1.0, 0.0, 0.0]


def test_a_sampler_by_its_name(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(sampler: .*?)```", TEXT, re.S)
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "Parrot" in code]
    (tmp_path / "parrot.py").write_text(code)
    named = train(tmp_path / "named", options=yaml.safe_load(text), search_paths=[tmp_path])
    passed = block("Parrot")["Parrot"](None, tiny.tokenizer(), [])
    rows = train(tmp_path / "passed", sampler=passed)
    for name in ("reward", "completions/mean_length", "loss"):
        assert [row[name] for row in named] == [row[name] for row in rows]


def test_a_kernel(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    for name in ("share_outside", "share_outside_triton"):
        (code,) = [c for c in blocks if f"def {name}(" in c]
        (tmp_path / f"{name}.py").write_text(code)
    check = """
import torch
from share_outside import share_outside
ratio = torch.linspace(0.5, 1.5, 3001)
ours, theirs = (share_outside(ratio, 0.8, 1.2, backend=b) for b in ("torch", "triton"))
torch.testing.assert_close(ours, theirs)
print(float(ours))
"""
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 0.59 < float(done.stdout) < 0.61


class GRPOSampling:
    max_new_tokens = 4


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (options,) = re.findall(r"```yaml\n(dataset:.*?)```", TEXT, re.S)
    (code,) = re.findall(r"```python\n(def from_question.*?)```", TEXT, re.S)
    rows = [{"question": "w4?", "answer": a} for a in ("w7", None)] + [
        {"question": "w4", "answer": "w7"}
    ]
    (tmp_path / "questions.py").write_text(code)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    named = {**yaml.safe_load(options), "on_bad_row": "skip"}
    assert len(train(tmp_path / "run", options=named)) == 2
    lines = (tmp_path / "run" / "skipped_rows.jsonl").read_text().splitlines()
    left_out, bad = (json.loads(line)["reason"] for line in lines)
    assert "leaves it out" in left_out and "not a question" in bad


def test_every_file_that_is_named_is_there() -> None:
    root = Path(__file__).parents[1]
    paths = re.findall(r"`((?:engine|kernels|tests|bench|docs)/[\w/.]+)`", TEXT)
    assert len(paths) > 5
    for path in paths:
        assert (root / path).exists() or (root / "fusedgrpo" / path).exists(), path
