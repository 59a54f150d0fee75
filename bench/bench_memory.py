"""What a step needs on a GPU: planned from the configuration, simulated, and measured.

    python bench/bench_memory.py --json memory.jsonl
    python bench/bench_memory.py --cases 0,1 --measure        # on a GPU

planned: ``fusedgrpo.engine.memory_plan``, from the model's configuration alone. simulated: the
product's own step on fake tensors (``simulate.py``), whole model, real optimizer. measured, with
``--measure`` and a GPU: ``torch.cuda.max_memory_allocated`` of the same step on random weights,
with the process limited to the card's size (``torch.cuda.set_per_process_memory_fraction``). All
are bytes of tensors at the peak of a phase; what a card needs beside them (CUDA context,
fragmentation) is in the line ``needed``, planned only.

Cases: completions of full length, G of one prompt per step, NF4 with double quantisation, LoRA on
all linear layers, gradient checkpointing, AdamW with 32 bit. A micro-batch is one sequence where
the case does not say otherwise, so the figures are the least that the length needs.

Gate: planned and simulated differ by at most a tenth in every phase.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import harness
import simulate
import torch

from fusedgrpo.engine.config import GRPOConfig
from fusedgrpo.engine.memory_plan import GIB, MemoryPlan, plan_memory
from fusedgrpo.models.storage_tracker import Peak

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

    @property
    def config(self) -> GRPOConfig:
        return GRPOConfig(
            load_in_4bit=True,
            lora_r=self.rank,
            num_generations=self.G,
            per_device_train_batch_size=self.G,
            max_completion_length=self.C,
            tokens_per_microbatch=self.tokens or self.P + self.C,
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
    parser = harness.parser(__doc__, [])
    parser.add_argument("--cases", metavar="0,1,...", help="which (default: all)")
    parser.add_argument("--measure", action="store_true", help="also on the GPU, in its memory")
    args = parser.parse_args()
    known = QUICK if args.quick else CASES
    try:
        chosen = [known[int(i)] for i in args.cases.split(",")] if args.cases else known
    except (ValueError, IndexError):
        parser.error(f"--cases: there are 0 to {len(known) - 1}")
    if args.measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU")
    rows: list[dict[str, Any]] = []
    for case in chosen:
        rows += run(case, args.measure)
        if args.json is not None:
            harness.write(rows, args.json)


def run(case: Case, measure: bool) -> list[dict[str, Any]]:
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
    print(f"  {'GiB':<18}{'planned':>10}{'simulated':>11}{'measured':>10}")
    for name, size in plan.totals.items():
        real = f"{measured[name] / GIB:10.2f}" if name in measured else f"{'-':>10}"
        print(f"  {name:<18}{size / GIB:10.2f}{simulated[name] / GIB:11.2f}{real}")
    verdict = "below" if plan.needed < case.card * GIB else "NOT below"
    print(
        f"  {'needed':<18}{plan.needed / GIB:10.2f}   {verdict} {case.card}"
        + (f"; published: {case.published}" if case.published else "")
    )
    figures = {"planned": plan.totals | {"needed": plan.needed}, "simulated": simulated}
    figures |= {"measured": measured} if measured else {}
    return [
        {
            "bench": "memory", "case": case.describe(), "impl": harness.OURS,
            "metric": f"{how}/{phase}", "value": size, "unit": "byte",
        } | harness.about()
        for how, of_phase in figures.items()
        for phase, size in of_phase.items()
    ]  # fmt: skip


def measure_peaks(case: Case, plan: MemoryPlan) -> dict[str, int]:
    """The same phases for real, on random weights: bytes by phase. The sampler runs its whole
    rollout, with no end-of-sequence token, so that every completion has full length."""
    from fusedgrpo.engine.memory_guard import MemoryGuard
    from fusedgrpo.engine.optim import build_optimizer
    from fusedgrpo.engine.sampler import GenerateSampler, SamplingParams
    from fusedgrpo.models import loading
    from fusedgrpo.models.policy import Policy

    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
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
    with phase("weights"):
        pass
    guard = MemoryGuard(plan.tokens_per_microbatch, plan.max_in_flight)

    class NoText:
        pad_token_id = 0

        def decode(self, ids: Any, **_: Any) -> str:
            return ""

    sampler = GenerateSampler(run, NoText(), [-1], guard=guard)
    with phase("rollout"):
        params = SamplingParams(max_new_tokens=case.C)
        sampler.sample([[1] * case.P], case.G, params, seed=0)
    samples = simulate.longest_samples(config, case.P, 1)
    with phase("scoring"):
        simulate.score(run, config, samples)
    found = simulate.update_peaks(run, optimizer, DeviceTracker(), config, samples)
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
