from __future__ import annotations

from pathlib import Path

import pytest

from fusedgrpo.cli import _overrides
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError


def test_options_are_read_in_both_spellings() -> None:
    words = ["--beta=0.1", "--learning-rate", "-1", "--bf16", "--run_name=a-b=c", "--use_cpu"]
    assert _overrides(words) == {
        "beta": "0.1",
        "learning_rate": "-1",
        "bf16": None,
        "run_name": "a-b=c",
        "use_cpu": None,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta=0.1", "--beta", "0.2"], "--beta is given twice"),
        (["--save-steps=1", "--save_steps=1"], "--save_steps is given twice"),
        (["0.1"], "'0.1' on the command line belongs to no option"),
        (["--bf16=true", "\x1b[31m"], r"'\\x1b\[31m' on the command line belongs to no option"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _overrides(words)


def test_only_a_truth_value_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("beta: 0\n")
    words = ["--bf16", "--disable_shuffling", "--use_peft", "--resume_from_checkpoint"]
    config = GRPOConfig.from_file(tmp_path / "c.yaml", _overrides(words))
    assert config.bf16 and not config.shuffle_dataset and config.resume_from_checkpoint is True
    for words in (["--output_dir", "--beta=1"], ["--learning_rate"], ["--dataset"]):
        with pytest.raises(ConfigError, match="has no value on the command line"):
            GRPOConfig.from_file(tmp_path / "c.yaml", _overrides(words))
    with pytest.raises(ConfigError, match="output_dir: expected text"):
        GRPOConfig.from_file(tmp_path / "c.yaml", _overrides(["--output_dir="]))
