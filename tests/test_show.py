"""What ``fusedgrpo show`` prints of a run's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fusedgrpo.cli import app
from fusedgrpo.engine.reporting import completions_folding
from fusedgrpo.engine.reporting.completions_folding import FoldingLog
from fusedgrpo.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    def record(group: int, prompt: Any, text: str, reward: float | None) -> dict[str, Any]:
        return {
            "group": group, "row": group, "prompt": prompt, "completion": text, "length": 3,
            "finish_reason": "stop", "rewards": {"accuracy": reward}, "reward": reward,
            "advantage": 0.5,
        }  # fmt: skip

    def write(folder: str, step: int, records: list[dict[str, Any]]) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        text = "".join(json.dumps({"step": step} | each) + "\n" for each in records)
        (tmp_path / folder / f"step-{step:06d}.jsonl").write_text(text)

    chat = [{"role": "system", "content": "Short."}, {"role": "user", "content": "1 +\x1b[2J 1?"}]
    for step in (1, 4):
        told = [record(0, chat, "three", 0.0), record(0, chat, "two\x1b[2J", 1.0)]
        write("completions", step, [*told, record(1, "plain", "none", None)])
    for step in (0, 2):
        told = [record(0, chat, "three", 0.0), record(1, "plain", "x", 1.0)]
        of_sets = [{"set": name, **each} for name in ("easy", "hard") for each in told]
        write("eval_completions", step, of_sets)
    write("held_out", 0, [record(0, chat, "three", 0.0), record(1, "p", "right", 1.0)])
    write("held_out", 4, [record(0, chat, "two", 1.0), record(1, "p", "wrong", 0.0)])
    return tmp_path


def said(*words: Any) -> str:
    done = CliRunner().invoke(app, ["show", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_rollout_is_listed_and_a_prompt_is_shown_with_its_best_answer_first(run: Path) -> None:
    head, first, second = said(run).splitlines()
    assert head == "step 4 of 4: 2 prompts, 3 completions"
    assert first.split() == [
        r"0",
        r"reward",
        r"0.500",
        r"(0",
        r"to",
        r"1)",
        r"1",
        r"+\x1b[2J",
        r"1?",
    ]
    assert "reward      - (no reward)  plain" in second
    # Between rollouts the one that a step trained on.
    text = said(run, "--step", 3, "--prompt", 0)
    assert text.startswith("step 1 of 4") and "system: Short." in text
    assert text.index("two") < text.index("three") and "\x1b" not in text
    assert "accuracy 1.00, advantage 0.500, 3 tokens, stop" in text


def test_held_out_prompts_are_shown_before_and_after(run: Path) -> None:
    lines = said(run, "--held_out").splitlines()
    assert lines[0] == "step 0 against step 4: 2 prompts, 1 lost, 1 newly solved"
    assert [line.split()[1] for line in lines[1:]] == ["lost", "newly"]
    text = said(run, "--held_out", "--prompt", 1)
    assert text.index("before: reward 0.00") < text.index("three") < text.index("after: reward")


def test_an_evaluation_is_shown_like_a_rollout_with_its_sets(run: Path) -> None:
    head, *lines = said(run, "--evaluated").splitlines()
    assert head == "step 2 of 2: 4 prompts, 4 completions"
    assert [line.split()[-2:] for line in lines[1::2]] == [["easy:", "plain"], ["hard:", "plain"]]
    text = said(run, "--evaluated", "--step", 1, "--prompt", 3)
    assert text.startswith("step 0 of 2") and "plain" in text and "reward 1.00" in text


def test_folded_completions_are_shown_as_well(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [said(run, "--step", step, "--prompt", 0) for step in (1, 4)]
    monkeypatch.setattr(completions_folding, "FOLDED", 2)
    assert FoldingLog(run / "completions").fold_if_due() is None
    assert not list((run / "completions").glob("*.jsonl"))
    assert [said(run, "--step", step, "--prompt", 0) for step in (1, 4)] == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "--step 0: the first rollout is that of step 1"),
        (["--evaluated", "--step", "-1"], "the first evaluation is that of step 0"),
        (["--evaluated", "--held_out"], "--held_out, --evaluated: one at a time"),
        (["--prompt", "7"], "--prompt 7: there are 0 to 1"),
        (["--held_out", "--step", "1"], "--step: --held_out compares the first check"),
    ],
)
def test_what_is_not_there_is_said(run: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        said(run, *words)


def test_a_folder_that_is_no_run_is_said(tmp_path: Path) -> None:
    for words in ([], ["--held_out"], ["--evaluated"]):
        with pytest.raises(ConfigError, match="has no "):
            said(tmp_path, *words)
