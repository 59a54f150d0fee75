"""The memory plan, as ``fusedgrpo plan`` and a run show and use it."""

from __future__ import annotations

import json
import re

import process_runs
import pytest
import tiny
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

from fusedgrpo.cli import app
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import ConfigError
from fusedgrpo.models.activation_offload import OffloadActivations

CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """A configuration of a 7B model of which only config.json is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN_7B))
    options = {
        "model_name_or_path": str(tmp_path / "model"), "dataset": "data.jsonl",
        "reward_funcs": "accuracy", "load_in_4bit": True, "lora_r": 64, "bf16": True,
        "max_completion_length": 2048, "prompts_per_step": 1,
        # Quickly measured; other samplers are planned in test_planner.py and test_decoder.py.
        "sampler": "generate", "tokens_per_microbatch": 2560,
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    return str(tmp_path / "config.yaml")


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_plan_needs_no_weights_and_says_that_it_fits(recipe):
    done = invoke(recipe, "--gpu", "24GB")
    assert done.exit_code == 0, done.output
    assert "It fits" in done.output
    for phase in ("rollout", "scoring", "update forward", "update backward", "optimizer step"):
        assert phase in done.output


def test_plan_knows_of_a_reward_model(recipe, tmp_path):
    (tmp_path / "judge").mkdir()
    judge = QWEN_7B | {"num_hidden_layers": 1, "architectures": ["Qwen2ForSequenceClassification"]}
    (tmp_path / "judge" / "config.json").write_text(json.dumps(judge))
    done = invoke(recipe, "--gpu", "24GB", "--reward_funcs", f"accuracy,{tmp_path / 'judge'}")
    assert done.exit_code == 0, done.output
    # Embeddings and a layer: 152,064 x 3,584 + 233,057,792 parameters of 2 bytes are 1.45 GiB.
    assert re.search(r"reward models +1\.4[0-9]", done.output), done.output


@pytest.mark.slow
def test_plan_says_what_is_missing_and_what_would_fit(recipe):
    done = invoke(recipe, "--gpu", "12GB", "--tokens_per_microbatch", "16384")
    assert done.exit_code == 1, done.output
    assert "It does not fit" in done.output
    assert "What does: tokens_per_microbatch: 2560: " in done.output


def test_plan_without_a_card_asks_for_one(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = invoke(recipe)
    assert isinstance(done.exception, ConfigError) and "--gpu 24GB" in str(done.exception)


def test_a_size_that_is_none_is_refused(recipe):
    done = invoke(recipe, "--gpu", "big")
    assert isinstance(done.exception, ConfigError) and "24GB" in str(done.exception)


def rows(trainer):
    trainer.train()
    found = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    return found, [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in found]


@pytest.mark.slow
def test_a_run_for_a_named_card_prints_its_plan_and_keeps_to_it(tmp_path, capsys):
    def make(name, **changes):
        model = str(tiny.save(tmp_path / "model", tiny.model("Llama")))
        options = {"prompts_per_step": 2, "gradient_checkpointing": True}
        return process_runs.make(tmp_path / name, model=model, **options, **changes)

    _, plain = rows(make("plain"))
    run = make("planned", gpu_memory="8GB", activation_offloading=True)
    written, planned = rows(run)
    said = capsys.readouterr().out
    assert "Memory, planned" in said and "It fits" in said
    assert {row["memory/planned"] for row in written} == {run.memory_plan.peak}
    assert isinstance(run.learner.offload, OffloadActivations)
    assert run.execution.oom_retry.tokens == run.memory_plan.tokens_per_microbatch
    assert run.execution.oom_retry.in_flight == run.memory_plan.max_in_flight == 8
    for got, want in zip(planned, plain, strict=True):
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_the_plan_of_a_run_has_its_reward_models(tmp_path):
    judge = tiny.model("Llama")
    of = LlamaConfig(**judge.config.to_dict() | {"num_labels": 1})
    reward = LlamaForSequenceClassification(of)
    reward.save_pretrained(tmp_path / "judge")
    tiny.tokenizer().save_pretrained(tmp_path / "judge")
    trainer = process_runs.make(
        tmp_path / "run", model=str(tiny.save(tmp_path / "model", judge)), gpu_memory="8GB",
        reward_funcs=[str(tmp_path / "judge")],
    )  # fmt: skip
    planned = trainer.memory_plan.resident["reward models"]
    assert planned == sum(p.nbytes for p in (*reward.parameters(), *reward.buffers()))


def test_offloading_without_checkpointing_is_refused():
    from fusedgrpo import GRPOConfig

    with pytest.raises(ConfigError, match="gradient_checkpointing: true"):
        GRPOConfig(activation_offloading=True, gradient_checkpointing=False)


def test_the_clock_has_the_peak_of_each_phase_on_a_gpu(monkeypatch):
    from fusedgrpo.engine.memory.plan import measured_phases
    from fusedgrpo.engine.reporting.phase_timer import PhaseTimer

    peaks = iter([30, 10, 20, 5])
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: next(peaks))
    clock = PhaseTimer(on_gpu=True)
    for name in ("sample", "score", "update", "sample"):
        with clock.phase(name):
            pass
    found = clock.metrics(1)
    assert found["memory/peak"] == 30
    assert measured_phases(found) == {"rollout": 30, "scoring": 10, "update backward": 20}
