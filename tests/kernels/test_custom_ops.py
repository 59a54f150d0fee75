"""Log-prob, fused loss and draw as operators: for opcheck, torch.compile, checkpointing, DDP."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from paged import paged
from torch.utils.checkpoint import checkpoint

from fusedgrpo.kernels import (
    GRPOLoss,
    LossOptions,
    decode_attention,
    linear_logprob,
    linear_policy_loss,
    linear_sample,
)
from fusedgrpo.kernels.backend import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="about operators, not about kernels")

N, H, V = 9, 6, 31
ENDS = torch.tensor([0, 4, 9])
ADVANTAGES = torch.tensor([1.0, -0.5])


def make(trainable=True):
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=trainable)
    bias = torch.randn(V, requires_grad=trainable)
    return hidden, weight, bias, torch.randint(0, V, (N,))


def logprob_arguments(trainable, mask, entropy):
    hidden, weight, bias, targets = make(trainable)
    mask = torch.arange(N) % 3 != 0 if mask else None
    return (
        hidden, weight, bias, targets, mask, 0.7, 1.0, 5.0, entropy, entropy, True, False,
        "torch",
    )  # fmt: skip


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("mask,entropy", [(False, False), (True, True)])
def test_linear_logprob_passes_opcheck(trainable, mask, entropy):
    op = torch.ops.fusedgrpo.linear_logprob.default
    torch.library.opcheck(op, logprob_arguments(trainable, mask, entropy))


@pytest.mark.parametrize("trainable", [False, True])
def test_linear_policy_loss_passes_opcheck(trainable):
    hidden, weight, bias, targets = make(trainable)
    arguments = (
        hidden, weight, bias, targets, ADVANTAGES, ENDS, torch.tensor(9.0), None, None, None,
        torch.ones(N), LossOptions().to_numbers(), 1.0, 1.0, None, True, True, trainable,
        trainable, "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedgrpo.linear_policy_loss.default, arguments)


def test_the_backward_operators_pass_opcheck():
    g, u = torch.randn(N), torch.randn(N, H)
    torch.library.opcheck(torch.ops.fusedgrpo.scale_rows.default, (g, u, None, u[:0]))
    hidden, weight, bias, targets = (x.detach() for x in make())
    logp, z, entropy = torch.randn(3, N)
    arguments = (
        hidden, weight, bias, targets, None, logp, z, entropy, g, None, 1.0, 1.0, None,
        True, True, "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fusedgrpo.linear_logprob_head_gradients.default, arguments)
    torch.library.opcheck(
        torch.ops.fusedgrpo.scale_gradient.default, (torch.tensor(2.0), u, torch.bfloat16)
    )


@pytest.mark.parametrize("window,softcap", [(None, None), (3, 2.0)])
def test_decode_attention_passes_opcheck(window, softcap):
    case = paged([5, 3], [[2, 6], [1]], d_values=8)
    case = case.replace(keys=case.keys.nan_to_num(), values=case.values.nan_to_num())
    op = torch.ops.fusedgrpo.decode_attention.default
    torch.library.opcheck(op, (*case, 0.25, window, softcap, "torch"))


def test_decode_attention_compiles_without_a_graph_break():
    case = paged([5, 3], [[2, 6], [1]])
    compiled = torch.compile(
        lambda *x: decode_attention(*x, window=4) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*case), decode_attention(*case, window=4) * 2)


@pytest.mark.parametrize("greedy", [False, True])
def test_linear_sample_passes_opcheck(greedy):
    hidden, weight, bias, ids = (x.detach() for x in make())
    arguments = (hidden, weight, bias, ids, torch.arange(N), 0.7, 1.0, 5.0, greedy, "torch")
    torch.library.opcheck(torch.ops.fusedgrpo.linear_sample.default, arguments)


def test_a_draw_compiles_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: linear_sample(*x, temperature=0.7), fullgraph=True, backend="aot_eager"
    )
    for rows in (4, 7, 9):
        hidden, weight, _, ids = make()  # that need gradients, and get none
        arguments = hidden[:rows], weight, ids[:rows], torch.arange(rows)
        got, want = compiled(*arguments), linear_sample(*arguments, temperature=0.7)
        assert torch.equal(got.token, want.token) and torch.equal(got.logp, want.logp)
        assert not got.logp.requires_grad


def two_losses(hidden, weight, bias, targets):
    """Both operations in one function, as a trainer would call them."""
    logp, entropy = linear_logprob(
        hidden, weight, targets, bias=bias, temperature=0.7, return_entropy=True
    )
    fused = linear_policy_loss(
        hidden, weight, targets, ADVANTAGES, ENDS, options=LossOptions(), bias=bias
    )
    return (logp * 0.3 + entropy).sum() + fused.loss, fused.metrics["clip_ratio/low_mean"]


BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        ],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trainable", [False, True])
def test_compiled_without_a_graph_break_it_equals_eager(backend, trainable, monkeypatch, tmp_path):
    monkeypatch.undo()  # Inductor would compile the poison of torch.empty as well
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    compiled = torch.compile(two_losses, fullgraph=True, backend=backend)
    arguments = make(trainable)
    inputs = [x for x in arguments if x.requires_grad]
    want, _ = two_losses(*arguments)
    got, _ = compiled(*arguments)
    assert torch.allclose(got, want)
    ours = torch.autograd.grad(got, inputs)
    for a, b in zip(ours, torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_with_another_number_of_rows_and_under_autocast():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w, t: linear_logprob(h, w, t).logp, fullgraph=True, backend="aot_eager"
    )
    for rows in (4, 7, 9):
        hidden, weight, _, targets = make(False)
        with torch.autocast("cpu", torch.bfloat16):
            got = compiled(hidden[:rows], weight, targets[:rows])
            want = linear_logprob(hidden[:rows], weight, targets[:rows]).logp
        assert torch.equal(got, want)


def test_a_module_around_the_loss_compiles():
    torch._dynamo.reset()
    loss_fn = GRPOLoss(beta=0.1, temperature=0.7)
    hidden = torch.randn(2, 5, H, requires_grad=True)
    ids, mask = torch.randint(0, V, (2, 5)), torch.ones(2, 5)
    ref = torch.randn(2, 5)
    weight = torch.randn(V, H)
    arguments = (hidden, weight, ids, mask, ADVANTAGES, None, ref)
    got = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")(*arguments)[0]
    want = loss_fn(*arguments)[0]
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (got, want)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing_the_gradients_are_the_same(reentrant):
    hidden, weight, bias, targets = make()
    inputs = (hidden, weight, bias)
    want = torch.autograd.grad(two_losses(*inputs, targets)[0], inputs)
    loss = checkpoint(lambda *x: two_losses(*x, targets)[0], *inputs, use_reentrant=reentrant)
    loss.backward()
    for x, grad in zip(inputs, want, strict=True):
        assert torch.equal(x.grad, grad)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V)

    def forward(self, x, targets):
        return two_losses(self.body(x), self.head.weight, self.head.bias, targets)[0]


def _ddp_worker(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    g = torch.Generator().manual_seed(rank)
    x, targets = torch.randn(N, H, generator=g), torch.randint(0, V, (N,), generator=g)
    ddp(x, targets).backward()
    torch.save([p.grad for p in model.parameters()], f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_under_ddp_every_gradient_of_the_head_is_averaged(tmp_path: Path):
    """TRL#7245: gradients written past autograd are not synchronised."""
    torch.multiprocessing.spawn(
        _ddp_worker, args=(str(tmp_path / "store"), str(tmp_path / "grads")), nprocs=2
    )
    torch.manual_seed(0)
    model = Net()
    for rank in range(2):
        g = torch.Generator().manual_seed(rank)
        x, targets = torch.randn(N, H, generator=g), torch.randint(0, V, (N,), generator=g)
        (model(x, targets) / 2).backward()
    for rank in range(2):
        for p, grad in zip(model.parameters(), torch.load(tmp_path / f"grads.{rank}"), strict=True):
            torch.testing.assert_close(p.grad, grad)
