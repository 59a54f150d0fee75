"""A run that was interrupted anywhere goes on as if it had not been, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import torch
from patience import HUNG

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import CheckpointError

PROMPTS = [{"prompt": f"w{4 + i} w{5 + i}"} for i in range(7)]
TIMES = ("time/", "step_time", "tokens_per_second", "memory/")


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Stop(Exception):
    pass


def make(directory: Path, **changes):
    options = {
        "output_dir": str(directory),
        "num_generations": 4,
        "prompts_per_step": 1,
        "max_completion_length": 5,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_dropout": 0.1,
        "beta": 0.1,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "bf16": False,
    }
    full = changes.get("finetuning_type") == "full"
    return GRPOTrainer(
        model=tiny.model(),
        reward_funcs=even_ids,
        args=GRPOConfig(**options | ({"learning_rate": 1e-3} if full else {}) | changes),
        train_dataset=PROMPTS,
        tokenizer=tiny.tokenizer(),
    )


def state(trainer):
    rows = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
    return rows, torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])


def interrupt_after(trainer, steps: int):
    step = trainer.learner.step

    def counting(samples, number):
        if number == steps:
            raise Stop
        return step(samples, number)

    trainer.learner.step = counting
    with pytest.raises(Stop):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, (1, 6)),
        (
            {"num_iterations": 2, "steps_per_generation": 16, "per_device_train_batch_size": 1},
            (1, 3, 6),
        ),
        ({"finetuning_type": "full", "beta": 0.0}, (3,)),
        ({"sampler_correction": True, "entropy_coef": 0.01}, (3,)),
    ],
    ids=["lora", "middle-of-a-window", "full", "sampler-correction"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, changes, places):
    whole = make(tmp_path / "whole", **changes)
    whole.train()
    expected_rows, expected_weights = state(whole)
    for after in places:
        interrupt_after(make(tmp_path / f"cut{after}", **changes), after)
        resumed = make(tmp_path / f"cut{after}", **changes)
        resumed.train(resume_from_checkpoint=True)
        rows, weights = state(resumed)
        assert rows == expected_rows, after
        assert torch.equal(weights, expected_weights), after


@pytest.mark.parametrize("in_a_window", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_in_bfloat16(tmp_path, pretended, in_a_window):
    pretended(bfloat16=True)
    changes = {"bf16": None, "max_steps": 6}
    if in_a_window:
        changes |= {"num_iterations": 2, "steps_per_generation": 2}
    whole = make(tmp_path / "whole", **changes)
    whole.train()
    assert whole.policy.precision == "bfloat16"
    interrupt_after(make(tmp_path / "cut", **changes), 3)
    resumed = make(tmp_path / "cut", **changes)
    resumed.train(resume_from_checkpoint=True)
    (rows, weights), (expected_rows, expected_weights) = state(resumed), state(whole)
    assert rows == expected_rows
    assert torch.equal(weights, expected_weights)


def test_a_machine_of_another_precision_does_not_go_on_unless_it_is_asked_to(tmp_path, pretended):
    pretended(bfloat16=False)
    interrupt_after(make(tmp_path / "run", bf16=None, max_steps=3), 2)
    pretended(bfloat16=True)
    with pytest.raises(CheckpointError, match=r"the precision: float32 -> bfloat16, .*bf16: false"):
        make(tmp_path / "run", bf16=None, max_steps=3).train(True)
    same = make(tmp_path / "run", bf16=False, max_steps=3, allow_change=["bf16"])
    same.train(True)
    assert same.policy.precision == "float32" and len(state(same)[0]) == 3


def test_the_reference_of_a_full_run_is_still_the_initial_model(tmp_path):
    options = {"finetuning_type": "full", "beta": 0.2}
    whole = make(tmp_path / "whole", **options)
    whole.train()
    interrupt_after(make(tmp_path / "cut", **options), 3)
    resumed = make(tmp_path / "cut", **options)
    resumed.train("auto")
    assert torch.equal(state(resumed)[1], state(whole)[1])


def test_auto_starts_anew_where_there_is_nothing_and_true_does_not(tmp_path):
    make(tmp_path / "a", max_steps=1).train("auto")
    log = (tmp_path / "a" / "run.log").read_text()
    assert "auto: no checkpoint in" in log and "this is a new run" in log
    for fact in ("Versions: fusedgrpo ", "torch ", "Machine: ", "Command: "):
        assert fact in log
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        make(tmp_path / "b", max_steps=1).train(True)


def test_a_checkpoint_of_another_run_is_refused_by_what_changed(tmp_path):
    make(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1).train()
    with pytest.raises(CheckpointError, match=r"learning_rate: 0.01 -> 0.02"):
        make(tmp_path / "run", learning_rate=0.02, max_steps=2).train(True)
    longer = make(tmp_path / "run", max_steps=3, allow_change=["max_steps"])
    longer.train(True)
    assert [row["step"] for row in state(longer)[0]] == [1, 2, 3]


def test_a_run_that_has_ended_can_be_extended(tmp_path, caplog):
    """Without a schedule, to what a run of that length would have been, bit for bit."""
    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps"}
    whole = make(tmp_path / "whole", max_steps=3, **constant)
    whole.train()
    make(tmp_path / "run", max_steps=2, **constant).train()
    assert (tmp_path / "run/checkpoints/step-000002").is_dir()  # save_steps is 500
    longer = make(tmp_path / "run", max_steps=3, **constant)
    longer.train("auto")
    assert torch.equal(state(longer)[1], state(whole)[1])
    assert "it is extended to 3 steps" in caplog.text
    caplog.clear()
    make(tmp_path / "run", max_steps=3, **constant).train("auto")
    assert "has done all its steps: a greater max_steps extends it" in caplog.text
    with pytest.raises(CheckpointError, match="learning_rate"):  # nothing else may change
        make(tmp_path / "run", max_steps=4, learning_rate=0.02, **constant).train("auto")


def test_a_damaged_checkpoint_is_passed_over_loudly_and_refused_by_path(tmp_path, caplog):
    make(tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=1).train()
    newest = tmp_path / "run/checkpoints/step-000003"
    victim = newest / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-1] ^= 1
    victim.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors has changed"):
        make(tmp_path / "run", max_steps=3).train(str(newest))
    make(tmp_path / "run", max_steps=3).train("auto")
    assert "adapter_model.safetensors has changed" in caplog.text


SCRIPT = """
import sys, time
sys.path.insert(0, {helpers!r})
import tiny
from fusedgrpo import GRPOConfig, GRPOTrainer

def reward(completion_ids, **kwargs):
    print("scored", flush=True)
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

GRPOTrainer(
    model=tiny.model(), reward_funcs=reward, tokenizer=tiny.tokenizer(),
    args=GRPOConfig(
        output_dir={out!r}, num_generations=4, prompts_per_step=1, max_completion_length=5,
        max_steps={steps}, learning_rate=1e-2, lora_r=4, gradient_checkpointing=False,
        save_strategy="no", resume_from_checkpoint="auto", bf16=False,
    ),
    train_dataset=[{{"prompt": f"w{{4 + i}} w{{5 + i}}"}} for i in range(7)],
).train()
"""


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_saves_and_exits_and_the_run_goes_on(tmp_path, number, code):
    helpers = str(Path(tiny.__file__).parent)

    def script(out: str, steps: int) -> list[str]:
        text = textwrap.dedent(SCRIPT).format(helpers=helpers, out=str(tmp_path / out), steps=steps)
        return [sys.executable, "-c", text]

    with subprocess.Popen(
        script("cut", 5000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        seen = 0
        for line in process.stdout:
            seen += line.startswith("scored")
            if seen == 4:
                process.send_signal(number)
                break
        rest, errors = process.communicate(timeout=HUNG)
    assert process.returncode == code, rest + errors
    assert f"Stopped by {number.name}" in rest
    assert "resume_from_checkpoint: auto" in rest
    saved = sorted((tmp_path / "cut/checkpoints").iterdir())
    assert saved and not list((tmp_path / "cut/checkpoints").glob(".*"))
    assert not (tmp_path / "cut" / "run.lock").exists()
