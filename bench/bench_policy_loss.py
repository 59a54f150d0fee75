"""The policy loss and the group advantages: time, memory, kernel launches.

    python bench/bench_policy_loss.py --peers trl --json x.jsonl

Loss ``dapo`` with ``beta=0.1``, old and reference log-probs given, forward and backward, metrics
included. ``fusedgrpo`` gets the tokens of all completions end to end; the others get the padded
``[B, T]`` that they work on, lengths from T / 2 to T: ``torch padded`` is the formula in plain
torch, ``torch.compile`` the same compiled (on a GPU only), ``trl`` the ``_compute_loss`` of its
trainer on given log-probs. Our metrics ending in ``/torch`` are those in plain torch, the
others are those of the backend that ``auto`` takes.

Gate: loss and gradient, or the advantages, against float64. On a CPU only ratios are given.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor

from fusedgrpo import host
from fusedgrpo.kernels import LossOptions, group_advantages, policy_loss
from fusedgrpo.kernels.reference import reference_group_advantages, reference_policy_loss

TOLERANCE = 1e-4
BETA = 0.1
EPSILON = 0.2
TORCH = f"{harness.OURS} torch"
METRICS = {
    "time": "ms",
    "peak_memory": "byte",
    "launches": "kernel",
    "relative": f"x {harness.OURS}",
}
UNITS = {**METRICS, **{f"{metric}/torch": unit for metric, unit in METRICS.items()}}

Work = Callable[[], dict[str, Tensor]]  # runs once; returns what the gate compares


def main() -> None:
    parser = harness.parser(__doc__, ["trl", "liger_kernel", "cut_cross_entropy"])
    parser.add_argument("--rounds", type=int, help="that count (default: 9, with --quick 2)")
    parser.add_argument("--device", default="cuda" if host.has_gpu() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 9)
    present = harness.installed([name for name in args.peers if name == "trl"])
    losses = [(4, 32)] if args.quick else [(8, 4096), (64, 512), (256, 1024)]
    groups = [(16, 4)] if args.quick else [(64, 8), (4096, 16)]
    rows = []
    for B, T in losses:
        batch = make_batch(B, T, args.device)
        samples = measure(loss_works(batch, present), loss_truth(batch), args.device, rounds)
        case = f"policy_loss, B={B}, T={T}, {len(batch.logp)} tokens, float32, {args.device}"
        rows += harness.report("policy_loss", case, samples, UNITS, distributions=args.peers)
    for B, G in groups:
        rewards = torch.randn(B, generator=torch.Generator().manual_seed(0)).to(args.device)
        ids = torch.arange(B, device=args.device) // G
        truth = {"advantages": reference_group_advantages(rewards.double(), ids)}
        samples = measure(advantage_works(rewards, G), truth, args.device, rounds)
        case = f"group_advantages, B={B}, G={G}, float32, {args.device}"
        rows += harness.report("policy_loss", case, samples, UNITS, distributions=args.peers)
    if args.json is not None:
        harness.write(rows, args.json)


@dataclass(frozen=True)
class Batch:
    """Ragged: logp, old_logp, ref_logp ``[N]``, advantages ``[B]``, cu_seqlens ``[B+1]``. mask:
    ``[B, T]``, where a padded tensor has tokens."""

    logp: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    advantages: Tensor
    cu_seqlens: Tensor
    mask: Tensor

    def padded(self, x: Tensor) -> Tensor:
        result = x.new_zeros(self.mask.shape)
        result[self.mask] = x.detach()
        return result


def make_batch(B: int, T: int, device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(T // 2, T + 1, (B,), generator=generator)
    lengths[0] = T
    N = int(lengths.sum())
    logp = -torch.rand(N, generator=generator)
    old, ref = (logp + 0.1 * torch.randn(N, generator=generator) for _ in range(2))
    return Batch(
        logp.to(device).requires_grad_(),
        old.to(device),
        ref.to(device),
        torch.randn(B, generator=generator).to(device),
        torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device),
        (torch.arange(T) < lengths[:, None]).to(device),
    )


def loss_truth(batch: Batch) -> dict[str, Tensor]:
    logp = batch.logp.detach().double().requires_grad_()
    loss = reference_policy_loss(
        logp,
        batch.advantages.double(),
        batch.cu_seqlens,
        options=LossOptions(loss_type="dapo", beta=BETA, epsilon=EPSILON),
        old_logp=batch.old_logp.double(),
        ref_logp=batch.ref_logp.double(),
    )
    loss.backward()
    assert logp.grad is not None
    return {
        "loss": loss.detach(),
        "gradient": logp.grad,
        "padded gradient": batch.padded(logp.grad),
    }


def loss_works(batch: Batch, present: list[str]) -> dict[str, Work]:
    def ragged(backend: Any) -> Work:
        def work() -> dict[str, Tensor]:
            batch.logp.grad = None
            loss = policy_loss(
                batch.logp,
                batch.advantages,
                batch.cu_seqlens,
                old_logp=batch.old_logp,
                ref_logp=batch.ref_logp,
                loss_type="dapo",
                beta=BETA,
                epsilon=EPSILON,
                backend=backend,
            ).loss
            loss.backward()
            assert batch.logp.grad is not None
            return {"loss": loss, "gradient": batch.logp.grad}

        return work

    old, ref = batch.padded(batch.old_logp), batch.padded(batch.ref_logp)
    leaf = batch.padded(batch.logp).requires_grad_()

    def padded(compute: Callable[..., Tensor]) -> Work:
        def work() -> dict[str, Tensor]:
            leaf.grad = None
            loss = compute(leaf, old, ref, batch.advantages, batch.mask)
            loss.backward()
            assert leaf.grad is not None
            return {"loss": loss, "padded gradient": leaf.grad}

        return work

    result = {harness.OURS: ragged("auto")}
    if batch.logp.is_cuda:
        result[TORCH] = ragged("torch")
    result["torch padded"] = padded(lambda *x: padded_loss(*x)[0])
    if batch.logp.is_cuda:
        compiled = torch.compile(padded_loss, dynamic=False)
        result["torch.compile"] = padded(lambda *x: compiled(*x)[0])
    if "trl" in present:
        result["trl"] = padded(trl_loss())
    return result


def padded_loss(
    logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """dapo with a bias-corrected KL: ``(loss, metrics)`` of ``[B, T]`` tensors."""
    A, count = advantages[:, None], mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    def of_completions(x: Tensor) -> Tensor:
        return (x * mask).sum(1) / mask.sum(1)

    ratio = (logp - old).exp()
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    kl = ((ref - logp).exp() - (ref - logp) - 1) * ratio
    loss = ((-torch.min(ratio * A, clipped * A) + BETA * kl) * mask).sum() / count
    low = ((ratio < 1 - EPSILON) & (A < 0)).float()
    high = ((ratio > 1 + EPSILON) & (A > 0)).float()
    metrics = {
        "kl": mean(kl.detach()),
        "clip_ratio/low_mean": mean(low),
        "clip_ratio/low_min": of_completions(low).min(),
        "clip_ratio/high_mean": mean(high),
        "clip_ratio/high_max": of_completions(high).max(),
        "clip_ratio/region_mean": mean(low + high),
    }
    return loss, metrics


def trl_loss() -> Callable[..., Tensor]:
    """TRL's own code on given log-probs: a trainer with what ``_compute_loss`` looks at."""
    from trl import GRPOTrainer

    given: dict[str, Tensor] = {}
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (given["logp"], given["zeros"], None),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=types.SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=types.SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=BETA,
        current_gradient_accumulation_steps=1,
        epsilon_high=EPSILON,
        epsilon_low=EPSILON,
        importance_sampling_level="token",
        loss_type="dapo",
        model=types.SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )

    def compute(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        if "zeros" not in given or given["zeros"].shape != logp.shape:
            given["zeros"] = torch.zeros_like(logp)
            given["ids"] = torch.zeros_like(logp, dtype=torch.int64)
            given["mask"] = mask.long()
            given["items"] = mask.sum()
        given["logp"] = logp
        inputs = {
            "prompt_ids": given["ids"][:, :1],
            "prompt_mask": given["mask"][:, :1],
            "completion_ids": given["ids"],
            "completion_mask": given["mask"],
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
            "num_items_in_batch": given["items"],
        }
        return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)

    return compute


def advantage_works(rewards: Tensor, G: int) -> dict[str, Work]:
    def plain() -> dict[str, Tensor]:
        x = rewards.view(-1, G)
        centred = x - x.mean(1, keepdim=True)
        return {"advantages": (centred / (x.std(1, keepdim=True) + 1e-4)).flatten()}

    def ours(backend: Any) -> Work:
        return lambda: {"advantages": group_advantages(rewards, group_size=G, backend=backend)}

    result = {harness.OURS: ours("auto")}
    if rewards.is_cuda:
        result[TORCH] = ours("torch")
    return result | {"torch padded": plain}


def measure(
    works: Mapping[str, Work], truth: Mapping[str, Tensor], device: str, rounds: int
) -> harness.Samples:
    harness.gate({name: deviations(work(), truth) for name, work in works.items()}, TOLERANCE)
    taken = harness.interleave(
        {name: harness.timed(work, device, repeat=20) for name, work in works.items()},
        rounds=rounds,
        warmup=2,
    )
    ours = taken[harness.OURS]["time"]
    samples: harness.Samples = {}
    for name, found in taken.items():
        result = {"relative": [t / o for t, o in zip(found["time"], ours, strict=True)]}
        if device != "cpu":
            result |= {
                "time": [1e3 * t for t in found["time"]],
                "peak_memory": found["peak_memory"],
                "launches": launches(works[name]),
            }
        impl, suffix = (harness.OURS, "/torch") if name == TORCH else (name, "")
        samples.setdefault(impl, {}).update({m + suffix: values for m, values in result.items()})
    return samples


def launches(work: Work) -> list[float]:
    """Kernels of one run; empty if the profiler sees none on this machine."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    count = sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.lower().startswith(("memcpy", "memset"))
        for event in profiler.events()
    )
    return [float(count)] if count else []


def deviations(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    return {
        name: ((x.double() - truth[name]).norm() / truth[name].norm()).item()
        for name, x in found.items()
    }


if __name__ == "__main__":
    main()
