"""Time and memory of log-probs from hidden states and their gradient, against the bare GEMMs.

    python bench/bench_linear_logprob.py --peers trl,liger_kernel,cut_cross_entropy --json x.jsonl

On a GPU in bfloat16, on a CPU in float32. Modes: ``no_grad``, log-probs alone (1 u = 2 N H V FLOP
are necessary); ``frozen``, forward and backward to the hidden states (2 u); with ``--trainable``
also to the weight of the head (3 u). ``bare GEMMs`` is that work and nothing else, in our tiles,
low precision in and out: z = h W^T, p W, p^T h. ``bound`` is a contender's time over that of the
bare GEMMs in the same round, ``speed`` the necessary work over its time. Peak memory is beyond the
inputs; the gradients are in it.

Logits are peaked (three competitors per row at 16 to 31), as those of trained models are: on flat
ones a kernel that skips small probabilities would skip nearly all of them. Our metrics ending in
``/linear_policy_loss`` are of that function, the others of ``linear_logprob``.

Gate: log-probs and gradients of some rows against float32 logits. It only tells right from wrong;
``bench_accuracy.py`` compares how exact they are. On a CPU only ratios are given: milliseconds of
whatever machine is at hand say little.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import head_contenders as heads
import torch
from torch import Tensor

from fusedgrpo import host
from fusedgrpo.kernels.launch import tiling

BARE = "bare GEMMs"
FLOAT32_TOLERANCE = 1e-3
LOW_PRECISION_TOLERANCE = 0.1
UNITS_OF_WORK = {"no_grad": 1, "frozen": 2, "trainable": 3}
METRICS = {"time": "ms", "bound": f"x {BARE}", "speed": "TFLOP/s", "peak_memory": "byte"}
VARIANT = "/linear_policy_loss"
UNITS = {
    **METRICS,
    **{metric + VARIANT: unit for metric, unit in METRICS.items()},
    "oom": "out of memory",
}


@dataclass(frozen=True)
class Case:
    """N tokens in completions of ``length`` each."""

    N: int
    H: int
    V: int
    length: int
    device: str
    dtype: torch.dtype

    def describe(self, mode: str) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{mode}, N={self.N}, H={self.H}, V={self.V}, {dtype}, {self.device}"

    def flop(self, mode: str) -> float:
        return UNITS_OF_WORK[mode] * 2.0 * self.N * self.H * self.V


def main() -> None:
    parser = harness.parser(__doc__, heads.PEERS)
    parser.add_argument("--trainable", action="store_true", help="also with a head that trains")
    parser.add_argument("--rounds", type=int, help="that count (default: 5, with --quick 2)")
    parser.add_argument("--device", default="cuda" if host.has_gpu() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    modes = ["no_grad", "frozen"] + ["trainable"] * args.trainable
    rounds = args.rounds or (2 if args.quick else 5)
    peers = heads.peers(args.peers, args.device)
    rows = []
    for case in cases(args.device, quick=args.quick):
        problem = make(case)
        describe_data(problem)
        contenders = [*heads.ours(), heads.plain_torch(), *peers]
        if args.device == "cuda":
            torch.compiler.reset()
            contenders.append(heads.torch_compiled())
        for mode in modes:
            samples = measure(case, mode, problem, contenders, rounds)
            rows += harness.report(
                "linear_logprob", case.describe(mode), samples, UNITS, distributions=args.peers
            )
    if args.json is not None:
        harness.write(rows, args.json)


def cases(device: str, *, quick: bool) -> list[Case]:
    if device == "cpu":
        shapes = [(64, 64, 1000, 16)] if quick else [(512, 256, 8192, 64)]
    elif quick:
        shapes = [(1024, 896, 16384, 256)]
    else:
        shapes = [
            (4096, 896, 151936, 512),
            (8192, 2048, 151936, 1024),
            (32768, 3584, 152064, 4096),
        ]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return [Case(*shape, device, dtype) for shape in shapes]


def make(case: Case) -> heads.Problem:
    generator = torch.Generator(case.device).manual_seed(0)
    hidden, weight = heads.random_head(case.N, case.H, case.V, generator)
    logits = heads.peaked_logits(case.N, generator)
    hidden, tokens = heads.boosted(hidden, weight, logits, generator)
    targets = heads.one_of(tokens, generator)
    advantages = torch.randn(case.N // case.length, generator=generator, device=case.device)
    return heads.Problem(
        hidden.to(case.dtype).requires_grad_(), weight.to(case.dtype), targets, advantages
    )


def some_rows(problem: heads.Problem, most: int) -> Tensor:
    N = len(problem.targets)
    return torch.arange(0, N, max(N // most, 1), device=problem.targets.device)[:most]


def describe_data(problem: heads.Problem) -> None:
    """What decides how much a kernel with a filter may skip, of 128 neighbouring rows."""
    hidden = problem.hidden.detach()[:128].float()
    log_p = (hidden @ problem.weight.detach().float().T).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1).mean().item()
    tiles = log_p.exp().amax(0).split(128)
    kept = statistics.mean(float(tile.max() > 2**-12) for tile in tiles)
    print(f"data: entropy {entropy:.2f} nats, {kept:.0%} of 128 x 128 tiles hold a p over 2^-12")


def measure(
    case: Case,
    mode: str,
    problem: heads.Problem,
    contenders: list[heads.Contender],
    rounds: int,
) -> harness.Samples:
    """Try all, gate, then time those that had memory enough, in turns."""
    problem.weight.requires_grad_(mode == "trainable")
    truth = reference(problem, mode)
    works: dict[str, Callable[[], Any]] = {}
    errors, too_large = {}, []
    for contender in contenders:
        if mode == "no_grad" and contender.logp is None:
            continue
        work = work_of(contender, problem, mode)
        if heads.out_of_memory(work):
            print(f"{contender.name}: out of memory in {case.describe(mode)}")
            too_large.append(contender.name)
            continue
        errors[contender.name] = deviations(contender, problem, mode, truth)
        works[contender.name] = work
    low = case.dtype != torch.float32
    harness.gate(errors, LOW_PRECISION_TOLERANCE if low else FLOAT32_TOLERANCE)
    problem.forget_gradients()
    works[BARE] = bare_gemms(problem, UNITS_OF_WORK[mode])

    def step(work: Callable[[], Any]) -> Callable[[], dict[str, float]]:
        timed = harness.timed(work, case.device)

        def run() -> dict[str, float]:
            problem.forget_gradients()  # the last one's gradients are nobody's memory
            return timed()

        return run

    steps = {name: step(work) for name, work in works.items()}
    taken = harness.interleave(steps, rounds=rounds, warmup=2)
    problem.forget_gradients()
    samples = figures(taken, case, mode)
    for name in too_large:
        impl, _ = impl_of(name)
        samples.setdefault(impl, {})["oom"] = [1.0]
    return samples


def work_of(contender: heads.Contender, problem: heads.Problem, mode: str) -> Callable[[], Any]:
    logp = contender.logp
    if mode != "no_grad":
        return lambda: contender.backward(problem)
    assert logp is not None

    @torch.no_grad()
    def work() -> None:
        logp(problem)

    return work


def bare_gemms(problem: heads.Problem, units: int) -> Callable[[], None]:
    """The first ``units`` of: logits, gradient of hidden, gradient of weight; tile by tile."""
    h, weight = problem.hidden.detach(), problem.weight.detach()
    (N, H), V = h.shape, len(weight)
    tile = tiling(H, V, h.dtype.itemsize, h.device.type)
    R, K = min(tile.rows, N), min(tile.columns, V)
    z, p = torch.empty(R, K, dtype=h.dtype, device=h.device), torch.rand(R, K, device=h.device)
    p = p.to(h.dtype)
    grad_h, grad_w = torch.empty_like(h[:R]), torch.empty_like(weight[:K])

    def work() -> None:
        for r in range(0, N, R):
            rows = h[r : r + R]
            n = len(rows)
            for k in range(0, V, K):
                w = weight[k : k + K]
                m = len(w)
                torch.mm(rows, w.T, out=z[:n, :m])
                if units > 1:
                    torch.mm(p[:n, :m], w, out=grad_h[:n])
                if units > 2:
                    torch.mm(p[:n, :m].T, rows, out=grad_w[:m])

    return work


def impl_of(name: str) -> tuple[str, str]:
    """Under which name it is reported, and what is added to its metrics."""
    return (harness.OURS, VARIANT) if name == heads.FUSED_LOSS else (name, "")


def figures(taken: harness.Samples, case: Case, mode: str) -> harness.Samples:
    """What is reported of the samples: on a CPU only how they compare with the bare GEMMs."""
    bare = taken[BARE]["time"]
    samples: harness.Samples = {}
    for name, found in taken.items():
        impl, suffix = impl_of(name)
        result = {"bound": [t / b for t, b in zip(found["time"], bare, strict=True)]}
        if case.device != "cpu":
            result["time"] = [1e3 * t for t in found["time"]]
            result["speed"] = [case.flop(mode) / t / 1e12 for t in found["time"]]
            if name != BARE:
                result["peak_memory"] = found["peak_memory"]
        samples.setdefault(impl, {}).update({m + suffix: values for m, values in result.items()})
    return samples


def reference(problem: heads.Problem, mode: str) -> dict[str, Tensor]:
    """From float32 logits: logp and the gradient of hidden for some rows, of the head for some ids.

    A gradient of the head sums over all rows: their normalisers are needed, chunk by chunk.
    """
    hidden, weight = problem.hidden.detach(), problem.weight.detach().float()
    rows = some_rows(problem, 64)
    c, target = problem.coefficient, problem.targets
    log_p = (hidden[rows].float() @ weight.T).log_softmax(1)
    logp = log_p.gather(1, target[rows, None])[:, 0]
    gradient = c[rows, None] * (weight[target[rows]] - log_p.exp() @ weight)
    result = {"logp": logp, "hidden": gradient}
    if mode == "trainable":
        ids = target[rows].unique()
        head = torch.zeros(len(ids), weight.shape[1], device=weight.device)
        for lo in range(0, len(hidden), 1024):
            part = slice(lo, lo + 1024)
            p = (hidden[part].float() @ weight.T).softmax(1)[:, ids]
            dz = c[part, None] * ((target[part, None] == ids).float() - p)
            head += dz.T @ hidden[part].float()
        result["weight"] = head
    return result


def deviations(
    contender: heads.Contender, problem: heads.Problem, mode: str, truth: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors, of the gradients that the trial run left."""
    rows = some_rows(problem, 64)
    found = {}
    if contender.logp is not None:
        with torch.no_grad():
            found["logp"] = contender.logp(problem)[rows]
    if mode != "no_grad":
        assert problem.hidden.grad is not None
        found["hidden"] = problem.hidden.grad[rows]
    if mode == "trainable":
        assert problem.weight.grad is not None
        found["weight"] = problem.weight.grad[problem.targets[rows].unique()]
    return {
        name: ((x.double() - truth[name].double()).norm() / truth[name].double().norm()).item()
        for name, x in found.items()
    }


if __name__ == "__main__":
    main()
