"""The two recipes that people paste: a LLaMA-Factory style YAML and a TRL style script.

They run here as they stand; the model is a tiny one under the name that they give it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from patience import HUNG

from fusedgrpo.engine.reporting.metrics_log import read_metrics

DATA = """[
  {"instruction": "计算 (3 + 5) × 2 = ?", "input": "", "output": "16"},
  {"instruction": "求解方程 2x + 3 = 11", "input": "", "output": "x = 4"}
]
"""

YAML = """### GRPO
model_name_or_path: Qwen/Qwen2.5-7B
stage: grpo
do_train: true
finetuning_type: lora

### GRPO parameters
num_generations: 8
pref_beta: 0.04

### rewards (verifiable, no reward model)
reward_funcs: accuracy,format

### LoRA
lora_rank: 64
lora_target: all

### data
dataset: my_math_data
template: qwen
cutoff_len: 4096

### training
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 5.0e-7
num_train_epochs: 1
bf16: true
output_dir: saves/qwen2.5-7b/lora/grpo
"""

SCRIPT = """from datasets import Dataset
dataset = Dataset.from_list(
    [{"prompt": f"w{i} w{i + 1}", "references": f"w{i + 2}"} for i in range(4, 7)]
)
from fusedgrpo import GRPOTrainer, GRPOConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
import re

model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-7B", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-7B")

def accuracy_reward(completions, references, **kwargs):
    rewards = []
    for completion, ref in zip(completions, references):
        match = re.search(r"<answer>(.*?)</answer>", completion)
        predicted = match.group(1).strip() if match else ""
        rewards.append(1.0 if predicted == ref else 0.0)
    return rewards

def format_reward(completions, **kwargs):
    rewards = []
    for completion in completions:
        has_think = "<think>" in completion and "</think>" in completion
        has_answer = "<answer>" in completion and "</answer>" in completion
        rewards.append(1.0 if has_think and has_answer else 0.0)
    return rewards

training_args = GRPOConfig(
    output_dir="saves/grpo", num_generations=8, per_device_train_batch_size=1,
    gradient_accumulation_steps=4, learning_rate=5e-7, bf16=True,
)
trainer = GRPOTrainer(
    model=model, args=training_args, train_dataset=dataset,
    tokenizer=tokenizer, reward_funcs=[accuracy_reward, format_reward],
)
trainer.train()
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A working directory in which ``Qwen/Qwen2.5-7B`` is a folder with a tiny model that stops
    early."""
    model = tiny.model("Llama", max_position_embeddings=8192)
    tiny.save(tmp_path / "Qwen" / "Qwen2.5-7B", model, template=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my_math_data.json").write_text(DATA, encoding="utf-8")
    (tmp_path / "grpo.yaml").write_text(YAML, encoding="utf-8")
    (tmp_path / "grpo.py").write_text(SCRIPT, encoding="utf-8")
    return tmp_path


def run(workplace: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=workplace,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HUNG,
    )


@pytest.mark.slow
def test_the_yaml_runs_as_it_stands(workplace):
    done = run(workplace, "-m", "fusedgrpo.cli", "train", "grpo.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    out = workplace / "saves/qwen2.5-7b/lora/grpo"
    rows = read_metrics(out / "metrics.jsonl")
    assert len(rows) == 2  # one prompt x 8 per step, one epoch of two prompts
    assert {"reward", "rewards/accuracy/mean", "rewards/format/mean", "kl"} <= set(rows[0])
    assert rows[0]["learning_rate"] == 5e-7
    adapter = json.loads((out / "adapter/adapter_config.json").read_text())
    assert adapter["r"] == 64 and adapter["lora_alpha"] == 128
    plan = "1 prompt x 8 completions per step (asked for 4 completions, rounded up"
    assert plan in done.stdout
    assert "learning_rate" in done.stdout  # 5e-7 is said to be too small for LoRA
    assert "qwen" in done.stderr  # the tiny tokenizer's template is not Qwen's


@pytest.mark.slow
def test_the_script_runs_as_it_stands(workplace):
    done = run(workplace, "grpo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    out = workplace / "saves/grpo"
    rows = read_metrics(out / "metrics.jsonl")
    assert len(rows) == 9  # three epochs of three prompts, one prompt per step
    assert {"rewards/accuracy_reward/mean", "rewards/format_reward/mean"} <= set(rows[0])
    for name in ("reward", "reward_std"):
        assert (out / "plots" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_options_on_the_command_line_win(workplace):
    done = run(
        workplace, "-m", "fusedgrpo.cli", "train", "grpo.yaml", "--num_generations", "3",
        "--max-completion-length=4", "--pref_beta", "0", "--reward_funcs", "format",
        "--output_dir", "elsewhere",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_metrics(workplace / "elsewhere/metrics.jsonl")
    assert rows[0]["completions/max_length"] <= 4 and "kl" not in rows[0]
    assert "2 prompts x 3 completions per step" in done.stdout


MISTAKES = [
    (["--learning_rat", "1"], 2, "learning_rat: unknown option. Did you mean 'learning_rate'?"),
    (["--epsilon=-0.2", "--beta=-1"], 2, "2 problems in the configuration"),
    (["stray"], 2, "'stray' on the command line belongs to no option"),
    (["--dataset", "nowhere"], 2, "nowhere"),
    (["--reward_funcs", "acuracy"], 1, "accuracy"),
    (["--model_name_or_path", "no/model"], 1, "no/model"),
]
# The command line once for each list of words; to start a Python for each takes the time.
EACH = """
import json, sys
from fusedgrpo.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["fusedgrpo", "train", "grpo.yaml", *words]
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    sys.stderr.write(f"\\0{code}\\0")
"""


@pytest.mark.slow
def test_mistakes_are_one_clear_message_and_an_exit_code(workplace):
    done = run(workplace, "-c", EACH, json.dumps([words for words, _, _ in MISTAKES]))
    said = done.stderr.split("\0")[:-1]
    assert done.returncode == 0 and len(said) == 2 * len(MISTAKES), done.stdout + done.stderr
    for i, (words, code, message) in enumerate(MISTAKES):
        assert said[2 * i + 1] == str(code), (words, done.stderr)
        assert message in said[2 * i], words
    assert "Traceback" not in done.stderr
    assert not (workplace / "saves/qwen2.5-7b/lora/grpo/metrics.jsonl").exists()


@pytest.mark.slow
def test_the_other_commands(workplace):
    doctor = run(workplace, "-m", "fusedgrpo.cli", "doctor")
    assert doctor.returncode == 0 and "transformers builds them" in doctor.stdout
    missing = run(workplace, "-m", "fusedgrpo.cli", "report", "saves")
    assert missing.returncode != 0 and "Traceback" not in missing.stderr
