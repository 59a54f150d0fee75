"""What a step needs on a GPU: planned from the configuration, simulated, and measured.

    python bench/bench_memory.py --json memory.jsonl
    python bench/bench_memory.py --cases 0,1 --measure        # on a GPU
    python bench/bench_memory.py --peers trl

planned: ``fusedgrpo.engine.memory.planner``, from the model's configuration alone. simulated: the
product's own step on fake tensors (``simulate.py``), whole model, real optimizer. measured, with
``--measure`` and a GPU: ``torch.cuda.max_memory_allocated`` of the same step on random weights,
with the process limited to the card's size (``torch.cuda.set_per_process_memory_fraction``). All
are bytes of tensors at the peak of a phase; what a card needs beside them (CUDA context,
fragmentation) is in the line ``needed``, planned only.

Cases: completions of full length, G of one prompt per step, NF4 with double quantisation, LoRA on
all linear layers, gradient checkpointing, AdamW with 32 bit. A micro-batch is one sequence where
the case does not say otherwise, so the figures are the least that the length needs.

The rollout is that of our own decoder, with ``--sampler generate`` that of transformers' generate;
from base and adapter, with ``--rollout-weights merged`` from a merged copy of the weights.

Peers: TRL's update step, simulated in the same way (``simulate_trl.py``), with all G sequences at
once (its default for G = 8) and with one. Its rollout is not simulated, nor is its step with
activations offloaded.

Gate: planned and simulated differ by at most a tenth in every phase.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import harness
import simulate
import torch

from fusedgrpo import host
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.plan import GIB, MemoryPlan, RolloutWeights
from fusedgrpo.engine.memory.planner import plan_memory
from fusedgrpo.engine.memory.storage_tracker import Peak

TOLERANCE = 0.1


@dataclass(frozen=True)
class Case:
    """tokens: per micro-batch; None for one sequence. card: GiB that it has to stay below.
    published: what somebody else has said of the same, GiB. layers: fewer than the model has."""

    model: str
    P: int
    C: int
    G: int = 8
    rank: int = 64
    tokens: int | None = None
    card: int = 24
    published: str = ""
    offload: bool = False
    layers: int | None = None
    sampler: str = "decoder"
    rollout_weights: RolloutWeights = "adapter"

    @property
    def config(self) -> GRPOConfig:
        return GRPOConfig(
            load_in_4bit=True,
            lora_r=self.rank,
            num_generations=self.G,
            per_device_train_batch_size=self.G,
            max_completion_length=self.C,
            tokens_per_microbatch=self.tokens or self.P + self.C,
            sampler=self.sampler,
            rollout_weights=self.rollout_weights,
        )

    @property
    def settings(self) -> Any:
        changes = {} if self.layers is None else {"num_hidden_layers": self.layers}
        return simulate.model_config(self.model, **changes)

    def describe(self) -> str:
        parts = [
            self.model, f"{self.G} x {self.P + self.C} tokens", f"NF4, LoRA r={self.rank}",
            f"{self.config.tokens_per_microbatch} tokens per micro-batch",
        ]  # fmt: skip
        if self.sampler != "decoder":
            parts.append(f"sampler: {self.sampler}")
        if self.rollout_weights != "adapter":
            parts.append(f"rollout_weights: {self.rollout_weights}")
        if self.offload:
            parts.append("activations offloaded")
        if self.layers is not None:
            parts.append(f"{self.layers} layers only")
        return ", ".join(parts)


CASES = [
    Case("qwen2.5-7b", 512, 3584, card=16),
    Case("qwen2.5-7b", 512, 7680),
    Case("llama-3.1-8b", 512, 19968, published="Unsloth: 54.3"),
    Case("qwen2.5-14b", 512, 3584),
    Case("qwen2.5-1.5b", 256, 1792, tokens=8192, card=6),
    Case("llama-3.1-8b", 512, 19968, offload=True, published="Unsloth: 54.3"),
    Case("llama-3.2-3b", 256, 1792, G=16, rank=16),
    Case("qwen2.5-0.5b", 128, 384, G=16, rank=16, tokens=4096, card=6),
]
QUICK = [Case("qwen2.5-0.5b", 64, 192, G=4, rank=16, card=6, layers=2)]


def main() -> None:
    parser = harness.parser(__doc__, ["trl"])
    parser.add_argument("--cases", metavar="0,1,...", help="which (default: all)")
    parser.add_argument("--sampler", choices=["generate", "decoder"], default="decoder")
    parser.add_argument("--rollout-weights", choices=["adapter", "merged"], default="adapter")
    parser.add_argument("--measure", action="store_true", help="also on the GPU, in its memory")
    args = parser.parse_args()
    known = QUICK if args.quick else CASES
    try:
        chosen = [known[int(i)] for i in args.cases.split(",")] if args.cases else known
    except (ValueError, IndexError):
        parser.error(f"--cases: there are 0 to {len(known) - 1}")
    if args.measure and not host.has_gpu():
        parser.error("--measure needs a GPU")
    peers = harness.installed(args.peers)
    rows: list[dict[str, Any]] = []
    for case in chosen:
        case = replace(case, sampler=args.sampler, rollout_weights=args.rollout_weights)
        rows += run(case, args.measure, peers)
        if args.json is not None:
            harness.write(rows, args.json)


def run(case: Case, measure: bool, peers: Sequence[str]) -> list[dict[str, Any]]:
    """The table of one case, printed, and its rows."""
    plan = plan_memory(
        case.config, case.settings, gpu_bytes=case.card * GIB, prompt_tokens=case.P,
        activation_offloading=case.offload,
    )  # fmt: skip
    found = simulate.simulate(
        case.config, case.settings, prompt_tokens=case.P, in_flight=plan.max_in_flight,
        offload=case.offload,
    )  # fmt: skip
    simulated = {name: peak.bytes for name, peak in found.peaks.items()}
    measured = measure_peaks(case, plan) if measure else {}
    print(f"\n{case.describe()}; {plan.max_in_flight} completions in flight")
    harness.gate(
        {"planned": {n: abs(plan.totals[n] / size - 1) for n, size in simulated.items()}}, TOLERANCE
    )
    figures = {
        (harness.OURS, "planned"): plan.totals | {"needed": plan.needed},
        (harness.OURS, "simulated"): simulated,
        (harness.OURS, "measured"): measured,
    }
    if case.offload:
        figures[harness.OURS, "planned"]["host"] = plan.host["offloaded activations"]
        simulated["host"] = found.host
    elif "trl" in peers:
        figures |= {(f"trl, {rows} at once", "simulated"): trl_peaks(case, rows)
                    for rows in (case.G, 1)}  # fmt: skip
    figures = {key: of_phase for key, of_phase in figures.items() if of_phase}
    show(figures)
    verdict = "below" if plan.needed < case.card * GIB else "NOT below"
    print(f"  needed is {verdict} {case.card} GiB"
          + (f"; published: {case.published}" if case.published else ""))  # fmt: skip
    return [
        {
            "bench": "memory", "case": case.describe(), "impl": impl,
            "metric": f"{how}/{phase}", "value": size, "unit": "byte",
        } | harness.about(peers)
        for (impl, how), of_phase in figures.items()
        for phase, size in of_phase.items()
    ]  # fmt: skip


def show(figures: dict[tuple[str, str], dict[str, int]]) -> None:
    names = [how if impl == harness.OURS else impl for impl, how in figures]
    print(f"  {'GiB':<18}" + "".join(f"{name:>16}" for name in names))
    for phase in dict.fromkeys(phase for of_phase in figures.values() for phase in of_phase):
        sizes = (of_phase.get(phase) for of_phase in figures.values())
        cells = (f"{'-':>16}" if size is None else f"{size / GIB:16.2f}" for size in sizes)
        print(f"  {phase:<18}" + "".join(cells))


def trl_peaks(case: Case, rows: int) -> dict[str, int]:
    from simulate_trl import simulate_trl

    found = simulate_trl(case.config, case.settings, prompt_tokens=case.P, rows=rows)
    return {name: peak.bytes for name, peak in found.peaks.items()}


def measure_peaks(case: Case, plan: MemoryPlan) -> dict[str, int]:
    """The same phases for real, on random weights: bytes by phase. Of the rollout the sampler runs
    the last token, for which every completion has full length, as in a run's rehearsal."""
    from fusedgrpo.engine.execution import Execution
    from fusedgrpo.engine.memory.oom_retry import OOMRetry
    from fusedgrpo.engine.optimizer import build_optimizer
    from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
    from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
    from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
    from fusedgrpo.models import loading
    from fusedgrpo.models.activation_offload import OffloadActivations
    from fusedgrpo.models.policy import Policy

    device = torch.device("cuda")
    _, total = host.gpu_memory(device)
    torch.cuda.set_per_process_memory_fraction(min(case.card * GIB / total, 1.0))
    config, settings = case.config, case.settings
    peaks: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        yield
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated()

    model = simulate.skeleton(config, settings)
    simulate.fill(model, lambda kind: contextlib.nullcontext(), "cuda")
    with mock.patch.object(loading, "check_head", lambda model: None):
        run = Policy.load(config, model)
    optimizer = build_optimizer(config, run.trainable())
    execution = Execution(OOMRetry(plan.tokens_per_microbatch, plan.max_in_flight))
    made = (run, simulate.NoText(), [-1])
    sampler: Sampler = GenerateSampler(*made, execution=execution)
    if case.sampler == "decoder":  # with the weights that it keeps
        sampler = DecoderSampler(*made, execution=execution, rollout_weights=case.rollout_weights)
    with phase("weights"):
        pass
    with phase("rollout"):
        params = SamplingParams(max_new_tokens=case.C)
        sampler.warm_up([[1] * case.P], case.G, params)
    samples = simulate.longest_samples(config, case.P, 1)
    with phase("scoring"):
        simulate.score(run, config, samples)
    offload = OffloadActivations(device) if case.offload else None
    found = simulate.update_peaks(run, optimizer, DeviceTracker(), config, samples, offload)
    return peaks | {name: peak.bytes for name, peak in found.items()}


class DeviceTracker:
    """What ``simulate.update_peaks`` needs of a tracker, from the device."""

    label = ""

    def start_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    @property
    def peak(self) -> Peak:
        torch.cuda.synchronize()
        return Peak(torch.cuda.max_memory_allocated(), {})


if __name__ == "__main__":
    main()
