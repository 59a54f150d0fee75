"""Runs whose completions have to match: checked before the model is there, trained, resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pieces
import pytest
import regex
import tiny
import torch
from transformers import PreTrainedTokenizerFast

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.config.structured import StructuredOutputs
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.rollout import structured
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.structured import check_structured, settle_schema
from fusedgrpo.engine.rollout.types import Completion, Group
from fusedgrpo.errors import CheckpointError, ConfigError

pytest.importorskip("llguidance")

PROMPTS = [{"prompt": text} for text in ("abc", "12 ab", "c", "yes?")]
MATCH = "[ab]{1,2}(12|c)"


def share_of_a(completions: list[str], **kwargs: Any) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in completions]


def make(directory: Path, sampler: Any = None, **changes: Any) -> GRPOTrainer:
    options = {
        "output_dir": str(directory), "num_generations": 4, "prompts_per_step": 2,
        "max_completion_length": 5, "max_steps": 4, "learning_rate": 1e-2, "bf16": False,
        "gradient_checkpointing": False, "structured_outputs": {"regex": MATCH}, "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 2, "log_completions": False,
    }  # fmt: skip
    tokenizer = pieces.tokenizer()
    model = tiny.model(vocab_size=272, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    return GRPOTrainer(
        model,
        share_of_a,
        GRPOConfig(**options | changes),
        PROMPTS,
        PROMPTS[:2],
        processing_class=tokenizer,
        sampler=sampler,
    )


def weights(trainer: GRPOTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])


def texts(folder: Path) -> list[str]:
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return [record["completion"] for record in map(json.loads, lines) if "completion" in record]


@pytest.mark.slow
def test_a_run_and_one_that_goes_on(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", save_steps=2)
    before = weights(whole).clone()
    whole.train()
    assert not torch.equal(weights(whole), before)
    said = {
        name: texts(tmp_path / "whole" / name)
        for name in ("completions", "eval_completions", "held_out")
    }
    assert all(said.values()), {name: len(found) for name, found in said.items()}
    for name, found in said.items():
        assert all(regex.fullmatch(MATCH, text) for text in found), name
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["clip_ratio/region_mean"] == 0 for row in rows), "policy to policy: ratio 1"
    assert rows[0]["sampling/sampling_logp_difference/mean"] > 0.1
    checkpoint = str(tmp_path / "whole/checkpoints/step-000002")
    again = make(tmp_path / "again", save_steps=2)
    again.train(checkpoint)
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(CheckpointError, match="structured_outputs"):
        make(tmp_path / "other", structured_outputs={"regex": "a"}).train(checkpoint)


def test_a_schema_in_a_file_is_in_the_record_of_the_run(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    args = GRPOConfig(structured_outputs={"json": "schema.json"})
    settle_schema(args, [tmp_path / "no", tmp_path])
    assert args.structured_outputs == {"json": schema}
    settle_schema(args, [])
    assert args.structured_outputs == {"json": schema}
    (tmp_path / "list.json").write_text("[1]")
    for name, said in (("none.json", r"no such file \(looked for "), ("list.json", "an object")):
        with pytest.raises(ConfigError, match=f"^structured_outputs: json: .*{said}"):
            settle_schema(GRPOConfig(structured_outputs={"json": name}), [tmp_path])


def test_the_sampler_of_somebody_else_is_told(tmp_path: Path) -> None:
    """And decides what it does with it: nothing is compiled here."""
    told: list[SamplingParams] = []

    class Told:
        def sample(self, prompt_ids: Any, n: int, params: SamplingParams, seed: int, **at: Any):
            told.append(params)
            said = Completion((64, 65), "ab", "length")
            rows = at["rows"]
            return [Group(rows[i], tuple(p), (said,) * n) for i, p in enumerate(prompt_ids)]

    asked = {"grammar": "not in the language of ours"}
    trainer = make(tmp_path, Told(), structured_outputs=asked, eval_strategy="no", max_steps=1,
                   held_out_check=False)  # fmt: skip
    trainer.train()
    assert {params.structured_outputs for params in told} == {StructuredOutputs(**asked)}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"regex": "(a"}, "regex: .*unclosed group"),
        ({"regex": r"\bab"}, "regex: .*lookarounds not supported"),
        ({"regex": r"[^\s\S]"}, "regex: no token can follow .*Nothing matches"),
        ({"json": {"type": "number", "multipleof": 3, "oneOf": [{}, {}]}}, "json: .*oneOf"),
        ({"json": {"$ref": "#/nowhere"}}, "json: .*nowhere"),
        ({"grammar": "start: nothing"}, "grammar: .*unknown name: \"nothing\""),
        ({"regex": "a{2}b{4}.*"}, "regex: a match is at least 6 tokens long with the end token, "
                                  "and max_completion_length is 5"),
        ({"choice": ["yes yes yes", "aaaaaaaaa"]}, "choice: a match is at least 6 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_a_model_is_loaded(
    tmp_path: Path, asked: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured.Policy, "__init__", None)
    with pytest.raises(ConfigError, match=f"^structured_outputs: {said}"):
        make(tmp_path, structured_outputs=asked)


def test_a_choice_that_fits_is_enough() -> None:
    tokenizer = pieces.tokenizer()
    check_structured(StructuredOutputs(choice=("a" * 20, "12 ")), tokenizer, 3)
    with pytest.raises(ConfigError, match="at least 3 tokens"):
        check_structured(StructuredOutputs(choice=("a" * 20, "12 ")), tokenizer, 2)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    check_structured(StructuredOutputs(regex="a"), endless, 3)


def test_a_tokenizer_that_the_library_does_not_know() -> None:
    with pytest.raises(ConfigError, match=r"llguidance does not know this tokenizer .*decoder"):
        check_structured(StructuredOutputs(regex="a"), tiny.tokenizer(), 5)


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    structured._library.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'fusedgrpo\[structured\]'"):
        check_structured(StructuredOutputs(regex="a"), pieces.tokenizer(), 5)
    structured._library.cache_clear()
