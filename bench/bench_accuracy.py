"""How far log-probs and gradients are from the truth, on bfloat16 inputs: ours, torch, the peers.

    python bench/bench_accuracy.py --peers trl,liger_kernel --json accuracy.jsonl

Data: ``flat``, logits of standard deviation 0.6 and random targets; ``peaked``, three competitors
per row, within 4 nats of a top logit of 16 to 31, one of them the target; ``collapsed``, targets of
probability over 1 - 1e-7. Truth: float64 arithmetic on the same bfloat16 inputs, the target's
column apart from the others. Each token's gradient d loss / d logp is drawn from N(0, 1); the head
is frozen.

``(GPU arithmetic)``, on a CPU: with the probabilities rounded to bfloat16 before their GEMM, as a
GPU has them.

Columns: the error of a log-prob in nats, greatest and mean; ``ratio``, the greatest
|exp(logp - truth) - 1|, which is what an importance ratio is off by before anything was learned;
the relative error of the gradient of the hidden states, of all rows together (Frobenius) and of
the worst row.

Exit code 1 if ours miss the bars of ``BARS``. Against each peer, "no worse" is: at most 4e-6 nats
more (one float32 step of a logit of 32), at most 1% more of a gradient's error. Gradients are
compared like with like: of a loss that knows its coefficients when it forms them (Liger's, our
``linear_policy_loss``) they are rounded once, of log-probs under any loss (TRL's, our
``linear_logprob``) as a factor and as a product.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import harness
import head_contenders as heads
import torch
from torch import Tensor

from fusedgrpo.kernels.logprob import vocab_pass

BARS = {"logp_max": 1e-5, "grad": 2.8e-3, "grad_worst_row": 5e-3}
UNITS = {
    "logp_max": "nat",
    "logp_mean": "nat",
    "ratio_max": "1",
    "grad": "relative",
    "grad_worst_row": "relative",
}
TIE_NATS = 4e-6
TIE_GRADIENT = 1.01

Errors = dict[str, float]


def main() -> None:
    parser = harness.parser(__doc__, heads.PEERS)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    args = parser.parse_args()
    N, H, V = (32, 256, 4096) if args.quick else (128, 896, 49152)
    shape = f"N={N}, H={H}, V={V}, bfloat16, {args.device}"
    peers = heads.peers(args.peers, args.device)
    if args.device == "cpu":  # its fallback for CPUs takes minutes; its kernel is for GPUs
        peers = [peer for peer in peers if peer.name != heads.SCALED_CE]
    errors: dict[tuple[str, str], Errors] = {}
    for data in ("flat", "peaked", "collapsed"):
        problem = make(data, N, H, V, args.device)
        logp, gradient = truth(problem)
        if data == "collapsed" and not logp.min() > -1e-7:
            raise AssertionError(f"collapsed: a target of logp {logp.min().item()}")
        for contender in (*heads.ours(), heads.plain_torch(), heads.torch_fp32(), *peers):
            errors[data, named(contender)] = measure(contender, problem, logp, gradient)
        if args.device == "cpu":
            with vocab_pass.probabilities_as(torch.bfloat16):
                for contender in heads.ours():
                    name = f"{named(contender)} (GPU arithmetic)"
                    errors[data, name] = measure(contender, problem, logp, gradient)
    about = harness.about(args.peers)
    print(f"\naccuracy: {shape}\n{about['machine']}; commit {about['commit']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()) + "\n")
    print(markdown(errors))
    if args.json is not None:
        rows = [
            figure | about
            for (data, name), found in errors.items()
            for figure in figures(data, name, shape, found)
        ]
        harness.write(rows, args.json)
    compare(errors, [peer.name for peer in peers])
    if missed := misses(errors):
        print("bars MISSED:\n  " + "\n  ".join(missed), file=sys.stderr)
        raise SystemExit(1)
    bars = ", ".join(f"{name} <= {bar:g}" for name, bar in BARS.items())
    print(f"\nours are within the bars: {bars}")


def make(data: str, N: int, H: int, V: int, device: str) -> heads.Problem:
    """One token a completion, so that every row has a gradient of its own."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = heads.random_head(N, H, V, generator)
    weight = weight.bfloat16().float()
    tokens = torch.randint(V, (N, 1), generator=generator, device=device)
    if data == "peaked":
        logits = heads.peaked_logits(N, generator)
        hidden, tokens = heads.boosted(hidden, weight, logits, generator)
    if data == "collapsed":
        logits = 31 + 3 * torch.rand(N, 1, generator=generator, device=device)
        hidden, tokens = heads.boosted(hidden, weight, logits, generator)
    targets = heads.one_of(tokens, generator)
    coefficient = torch.randn(N, generator=generator, device=device)
    return heads.Problem(
        hidden.bfloat16().requires_grad_(),
        weight.bfloat16(),
        targets,
        -N * coefficient,
    )


def truth(problem: heads.Problem, rows_at_once: int = 64) -> tuple[Tensor, Tensor]:
    """``(logp [N], gradient [N, H])`` in float64.

    With x_j = z_j - z_target: logp = -log1p(sum_others exp(x_j)), and the gradient of logp is
    sum_others p_j (W_target - W_j). Nothing is lost where p_target is nearly 1.
    """
    weight, coefficient = problem.weight.double(), problem.coefficient.double()
    logps, gradients = [], []
    for lo in range(0, len(problem.targets), rows_at_once):
        rows = slice(lo, lo + rows_at_once)
        target = problem.targets[rows]
        z = problem.hidden[rows].detach().double() @ weight.T
        x = (z - z.gather(1, target[:, None])).scatter(1, target[:, None], -torch.inf)
        others = x.logsumexp(1)
        logp = -torch.nn.functional.softplus(others, threshold=700)
        p = (x + logp[:, None]).exp()
        gradient = p.sum(1, keepdim=True) * weight[target] - p @ weight
        logps.append(logp)
        gradients.append(coefficient[rows, None] * gradient)
    return torch.cat(logps), torch.cat(gradients)


def measure(
    contender: heads.Contender, problem: heads.Problem, logp: Tensor, gradient: Tensor
) -> Errors:
    result = {}
    if contender.logp is not None:
        with torch.no_grad():
            error = contender.logp(problem).double() - logp
        result = {
            "logp_max": error.abs().max().item(),
            "logp_mean": error.abs().mean().item(),
            "ratio_max": error.expm1().abs().max().item(),
        }
    contender.backward(problem)
    assert problem.hidden.grad is not None
    off = problem.hidden.grad.double() - gradient
    result["grad"] = (off.norm() / gradient.norm()).item()
    result["grad_worst_row"] = (off.norm(dim=1) / gradient.norm(dim=1)).max().item()
    return result


def named(contender: heads.Contender) -> str:
    """Its name; of ours with the function."""
    ours = contender.name == harness.OURS
    return f"{harness.OURS} linear_logprob" if ours else contender.name


def is_ours(name: str) -> bool:
    return name.startswith(harness.OURS)


def figures(data: str, name: str, shape: str, errors: Errors) -> list[dict[str, Any]]:
    """One line of the table; which of ours it is stands in the case."""
    case, impl = f"{data}, {shape}", name
    if is_ours(name):
        case, impl = f"{case}, {name.removeprefix(harness.OURS).strip()}", harness.OURS
    return [
        {
            "bench": "accuracy",
            "case": case,
            "impl": impl,
            "metric": metric,
            "value": value,
            "unit": UNITS[metric],
        }
        for metric, value in errors.items()
    ]


def markdown(errors: Mapping[tuple[str, str], Errors]) -> str:
    lines = [
        "| data | impl | logp max | logp mean | ratio | gradient | worst row |",
        "|---|---|---|---|---|---|---|",
    ]
    for (data, name), found in errors.items():
        cells = [f"{found[metric]:.1e}" if metric in found else "" for metric in UNITS]
        lines.append(f"| {data} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compare(errors: Mapping[tuple[str, str], Errors], peers: Sequence[str]) -> None:
    """Say where ours are worse than somebody else, and whether a peer is among them."""
    print()
    for other in ("torch", "torch float32", *peers):
        worse = [
            f"{data}, {name}: {metric} {value:.2e} against {errors[data, other][metric]:.2e}"
            for (data, name), found in errors.items()
            if is_ours(name)
            for metric, value in found.items()
            if not (metric.startswith("grad") and other == "liger_kernel" and "logprob" in name)
            if metric in errors[data, other] and is_worse(metric, value, errors[data, other])
        ]
        print(f"ours against {other}: " + ("no worse in any column" if not worse else "WORSE in"))
        for line in worse:
            print(f"  {line}")


def is_worse(metric: str, value: float, other: Errors) -> bool:
    if metric.startswith("grad"):
        return not value <= other[metric] * TIE_GRADIENT
    return not value <= other[metric] + TIE_NATS


def misses(errors: Mapping[tuple[str, str], Errors]) -> list[str]:
    return [
        f"{data}, {name}: {metric} {found[metric]:.1e}, the bar is {bar:g}"
        for (data, name), found in errors.items()
        if is_ours(name)
        for metric, bar in BARS.items()
        if metric in found and not found[metric] <= bar  # not ">": NaN has to fail
    ]


if __name__ == "__main__":
    main()
