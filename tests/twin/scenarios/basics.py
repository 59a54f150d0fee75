"""What the CUDA twin itself does, and one policy on it; see test_basics.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import tiny
import torch
from cuda_twin.process import leave
from cuda_twin.twin import install
from torch import Tensor, nn

twin = install()

from fusedgrpo.kernels import linear_sample  # noqa: E402
from fusedgrpo.models.packed_attention import gather_rows  # noqa: E402
from fusedgrpo.models.policy import Policy  # noqa: E402


def refused(work: Callable[[], Any]) -> str:
    """What ``work`` raises."""
    try:
        work()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return "nothing was raised"


def devices() -> Any:
    host = torch.arange(6.0).view(2, 3)
    there = host.to("cuda")
    with twin.counted():
        return {
            "views": str(there.T[0].device),
            "results": str((there + 1).device),
            "made": str(torch.zeros(2, device="cuda").device),
            "made like": str(torch.zeros_like(there).device),
            "back": str(there.cpu().device),
            "a module's": str(next(nn.Linear(2, 2).cuda().parameters()).device),
            "copied": str(copy.deepcopy(there).device),
            "numbers of the host": str((there * torch.tensor(2.0)).device),
            "values": there.cpu().tolist(),
            "refused": {
                "sum": refused(lambda: there + host),
                "gathered": refused(lambda: host.index_select(0, torch.tensor([0]).cuda())),
                "numpy": refused(lambda: there.numpy()),
                "a kernel": refused(
                    lambda: linear_sample(
                        host, torch.ones(8, 3), torch.arange(2), torch.arange(2), backend="triton"
                    )
                ),
            },
        }


def counted() -> Any:
    """Each line for what it says."""
    there = torch.arange(8, device="cuda", dtype=torch.float32)
    into = torch.empty(8, pin_memory=True)
    event = torch.cuda.Event()

    def behind() -> None:
        event.record()
        there + 1
        event.synchronize()

    def not_behind() -> None:
        event.record()
        event.synchronize()

    lines: dict[str, Callable[[], Any]] = {
        "an operator": lambda: there + 1,
        "a view": lambda: there[2:].view(2, 3),
        "memory": lambda: torch.empty(3, device="cuda"),
        "on the host": lambda: into + 1,
        "item": lambda: there.sum().item(),
        "a truth": lambda: bool(there[0]),
        "a list": lambda: there.tolist(),
        "where": lambda: there.nonzero(),
        "a mask": lambda: there[there > 2],
        "to the host": lambda: there.cpu(),
        "from numbers": lambda: torch.tensor([1, 2], device="cuda"),
        "pageable": lambda: torch.ones(3).to("cuda"),
        "pageable, not waited for": lambda: torch.ones(3).to("cuda", non_blocking=True),
        "pinned": lambda: into.to("cuda", non_blocking=True),
        "pinned, waited for": lambda: into.to("cuda"),
        "into pinned memory": lambda: into.copy_(there, non_blocking=True),
        "into pageable memory": lambda: torch.empty(8).copy_(there, non_blocking=True),
        "an index of the host": lambda: there[torch.tensor([1])],
        "a cast": lambda: there.bfloat16(),
        "no cast": lambda: there.float(),
        "an event a step ago": behind,
        "an event of now": not_behind,
        "synchronize": torch.cuda.synchronize,
    }
    found = {}
    for name, line in lines.items():
        with twin.counted() as counts:
            line()
        found[name] = {kind: sum(of.values()) for kind, of in vars(counts).items()}
    with twin.counted() as counts:
        there.sum().item()
    return {"lines": found, "where": counts.plain()["waits"]}


def gradients_cross() -> Any:
    x = torch.ones(3, requires_grad=True)
    there = x.to("cuda")
    (there * 2).cpu().sum().backward()
    weight = torch.ones(3, 3, device="cuda", requires_grad=True)
    (weight @ there.detach()).sum().backward()
    assert x.grad is not None and weight.grad is not None
    return {"host": str(x.grad.device), "device": str(weight.grad.device), "grad": x.grad.tolist()}


def products() -> Any:
    a, b = (torch.randn(n, 16, dtype=torch.bfloat16).cuda() for n in (5, 7))
    wide = torch.mm(a, b.T, out_dtype=torch.float32)
    exact = (a.cpu().float() @ b.cpu().float().T).tolist()
    out = torch.ones(5, 7, device="cuda")
    torch.addmm(out, a, b.T, out=out, out_dtype=torch.float32)
    return {
        "wide": wide.tolist(),
        "added": (out - 1).tolist(),
        "exact": exact,
        "narrow": refused(lambda: torch.mm(a.float(), b.T.float(), out_dtype=torch.bfloat16)),
    }


def varlen() -> Any:
    """Against scaled_dot_product_attention of each sequence by itself."""
    from torch.nn.attention.varlen import varlen_attn

    lengths, keys = (3, 5), (7, 5)
    ends = [
        torch.tensor([0, *torch.tensor(n).cumsum(0)], dtype=torch.int32) for n in (lengths, keys)
    ]
    cu = [x.cuda() for x in ends]
    shapes = ((8, 4, 16), (12, 2, 16), (12, 2, 16))
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    grad = torch.randn(8, 4, 16).bfloat16()

    def alone(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        if window is not None:
            seen = seen.triu(len(k) - len(q) - window)
        heads = (x.transpose(0, 1) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(*heads, seen).transpose(0, 1)

    off = {}
    for window in (None, 2):
        here = [x.float().requires_grad_() for x in inputs]
        parts = [
            alone(here[0][a:b], here[1][c:d], here[2][c:d], window)
            for (a, b), (c, d) in zip(((0, 3), (3, 8)), ((0, 7), (7, 12)), strict=True)
        ]
        expected = torch.cat(parts)
        there = [x.cuda().requires_grad_() for x in inputs]
        size = (-1 if window is None else window, 0)
        out = varlen_attn(*there, *cu, 5, 7, window_size=size, enable_gqa=True)
        expected.backward(grad.float())
        out.backward(grad.cuda())
        pairs = [(out, expected), *((t.grad, h.grad) for t, h in zip(there, here, strict=True))]
        off[str(window)] = [
            float((t.detach().cpu().float() - h.detach()).abs().max()) for t, h in pairs
        ]
    short = refused(lambda: varlen_attn(*(x.cuda() for x in inputs), *cu, 4, 7, enable_gqa=True))
    wide = refused(
        lambda: varlen_attn(*(x.cuda().float() for x in inputs), *cu, 5, 7, enable_gqa=True)
    )
    return {"off": off, "short": short, "wide": wide}


def policy() -> Any:
    """Forward and backward in bfloat16, beside float32 on the CPU."""
    torch.manual_seed(0)
    built = tiny.model("Qwen2", scale=3.0, hidden_size=64, head_dim=32)
    pairs = [((5, 6, 7), (8, 9, 4)), ((5, 6, 7), (11, 12)), ((4,), (9, 30, 1))]
    exact = Policy(copy.deepcopy(built))
    expected = exact.logprobs(exact.pack(pairs)).logp
    expected.sum().backward()
    there = Policy(built.cuda(), compute_dtype=torch.bfloat16)
    with twin.counted() as counts:
        found = there.logprobs(there.pack(pairs)).logp
        found.sum().backward()
    grads = [
        torch.cat([p.grad.cpu().flatten() for p in of.model.parameters()]) for of in (there, exact)
    ]
    return {
        "layout": there.layout,
        "logp": float((found - expected.cuda()).detach().abs().max()),
        "grad": float((grads[0] - grads[1]).norm() / grads[1].norm()),
        "counts": counts.plain(),
    }


def gathered() -> Any:
    """Gradients of a row that is taken twice, where float32 would round them away."""
    x = torch.ones(2, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    grad = torch.tensor([[1.0], [1e-12], [1.0]], dtype=torch.float64, device="cuda").expand(3, 2)
    gather_rows(x, torch.tensor([0, 0, 1], device="cuda")).backward(grad)
    assert x.grad is not None
    return x.grad.tolist()


def frozen_casts() -> Any:
    layer = nn.Linear(4, 4, bias=False).cuda()
    layer.weight.requires_grad_(False)
    twin.watch(layer)
    x = torch.randn(2, 4, device="cuda")
    with twin.counted() as counts, torch.autocast("cuda", torch.bfloat16):
        layer(x)
    return sorted(name.split(" @ ")[0] for name in counts.plain()["casts"])


def unwritten() -> Any:
    return bool(torch.empty(3, device="cuda").isnan().all())


SCENARIOS = (
    devices, counted, gradients_cross, products, varlen, policy, gathered, frozen_casts, unwritten,
)  # fmt: skip
leave({scenario.__name__: scenario for scenario in SCENARIOS})
