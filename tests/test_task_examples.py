"""The configurations in examples/tasks are read; those for a 24 GB card fit it, those for a CPU run
there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import tiny
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config
from typer.testing import CliRunner

from fusedgrpo.cli import app
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.reporting.completions_reader import Completions
from fusedgrpo.tasks import is_task, shares_of, task_rows, verify

EXAMPLES = sorted((Path(__file__).parents[1] / "examples/tasks").glob("*.yaml"))
# Sizes of the published configurations.
SIZES = {
    "qwen2.5-7b-24gb": (3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-1.5b-24gb": (1536, 8960, 28, 12, 2, 151936, True),
}
# What a prompt of theirs looks like.
ON_CPU = {
    "smollm2-sums-cpu": r"12 \+ 25 = 37\n\d [+-] \d =",
    "smollm2-arithmetic-cpu": r"12 \+ 25 = 37\n\d\d [+-] \d\d =|12 \* 3 = 36\n\d \* \d =",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_read_and_its_tasks_are_there(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    config = GRPOConfig(**given)
    assert is_task(config.dataset)
    shares = shares_of(config.dataset, config.task_options, False)
    assert sum(share.size for share in shares) > 0
    assert f"examples/tasks/{path.name}" in path.read_text()
    assert path.stem in SIZES or path.stem in ON_CPU


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


def reads_anything(directory: Path) -> Path:
    """A random model of a tokenizer of bytes."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=258, special_tokens=["<eos>", "<pad>"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    made.save_pretrained(directory)
    built = tiny.model(vocab_size=len(made), bos_token_id=0, eos_token_id=0, pad_token_id=1)
    built.save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_it_runs_on_a_cpu_and_judges_answers(name: str, tmp_path: Path) -> None:
    model = reads_anything(tmp_path / "model")
    path = next(path for path in EXAMPLES if path.stem == name)
    done = CliRunner().invoke(
        app,
        [
            *("train", str(path), "--model_name_or_path", str(model), "--max_steps", "1"),
            *("--held_out_check", "false", "--max_samples", "8", "--prompts_per_step", "1"),
            *("--output_dir", str(tmp_path / "out"), "--use_cpu", "true"),
        ],
    )
    assert done.exit_code == 0, done.output
    said = Completions(tmp_path / "out/completions").read(1)
    assert len(said) == 8
    assert all(re.fullmatch(ON_CPU[name], one["prompt"]) for one in said)


@pytest.mark.parametrize(
    ("name", "task"),
    [("sums", "chain_sum"), ("arithmetic", "products"), ("arithmetic", "chain_sum")],
)
def test_a_short_prompt_keeps_its_verifier(
    name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))
    write = getattr(importlib.import_module("short_prompts"), name)
    rows = task_rows(f"reasoning_gym:{task}", {"size": 4}, held_out=False, messages=True)
    made = [write(row) for row in rows]
    columns = {n: [row[n] for row in made] for n in ("task", "task_index", "task_source")}
    assert verify([f" {row['answer']}\n" for row in made], **columns) == [1.0] * 4
    for row, short in zip(rows, made, strict=True):
        assert (
            short["prompt"].splitlines()[1].split("(")[-1].split(")")[0].rstrip(" =")
            in (row["prompt"][0]["content"])
        )
