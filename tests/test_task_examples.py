"""The configurations in examples/tasks are read, and those for a 24 GB card fit it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import yaml
from transformers import Qwen2Config
from typer.testing import CliRunner

from fusedgrpo.cli import app
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.tasks import is_task, shares_of

EXAMPLES = sorted((Path(__file__).parents[1] / "examples/tasks").glob("*.yaml"))
# Sizes of the published configurations.
SIZES = {
    "qwen2.5-7b-24gb": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-1.5b-24gb": (1536, 8960, 28, 12, 2, 151936, True),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_read_and_its_tasks_are_there(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    config = GRPOConfig(**given)
    assert is_task(config.dataset)
    shares = shares_of(config.dataset, config.task_options, False)
    assert sum(share.size for share in shares) > 0
    assert f"examples/tasks/{path.name}" in path.read_text()


@pytest.mark.parametrize("name", SIZES)
def test_it_fits_a_card_of_24_gb(name: str, tmp_path: Path) -> None:
    hidden, inner, layers, heads, kv_heads, vocab, tied = SIZES[name]
    config = Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        tie_word_embeddings=tied, max_position_embeddings=32768, eos_token_id=tiny.EOS,
        architectures=["Qwen2ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    tiny.tokenizer(template=True).save_pretrained(tmp_path)
    path = next(path for path in EXAMPLES if path.stem == name)
    done = CliRunner().invoke(
        app, ["plan", str(path), "--model_name_or_path", str(tmp_path), "--max_samples", "40"]
    )
    assert done.exit_code == 0, done.output
    assert "does not fit" not in done.output and "fits" in done.output
