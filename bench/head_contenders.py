"""From hidden states and a head to log-probs and their gradient: ours, plain torch, the peers.

Every contender gets the same ``Problem`` and does the same job: GRPO at ratio 1, where the loss is
``-1/N sum_t A_t logp_t``, so that d loss / d logp is the known ``coefficient`` of each token. One
that returns log-probs gets it as their gradient, one that returns a loss has it inside. Each is
called the way its own trainer does, with the least that it can be asked for (no entropy).

Shapes: N tokens, B completions of N / B tokens each, H hidden, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from torch import Tensor
from torch.nn.functional import linear

from fusedgrpo.kernels import LossOptions, linear_logprob, linear_policy_loss

PEERS = ("trl", "liger_kernel", "cut_cross_entropy")
SCALED_CE = "liger_kernel scaled CE"
FUSED_LOSS = f"{harness.OURS} linear_policy_loss"


@dataclass(frozen=True)
class Problem:
    """hidden: ``[N, H]``. weight: ``[V, H]``. targets: ``[N]`` int64. advantages: ``[B]``."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor

    @property
    def length(self) -> int:
        """Tokens of each completion."""
        return len(self.targets) // len(self.advantages)

    @property
    def cu_seqlens(self) -> Tensor:
        B = len(self.advantages)
        return torch.arange(B + 1, device=self.targets.device) * self.length

    @property
    def coefficient(self) -> Tensor:
        """d loss / d logp ``[N]``."""
        return -self.advantages.repeat_interleave(self.length) / len(self.targets)

    def padded(self, x: Tensor) -> Tensor:
        return x.view(len(self.advantages), self.length, *x.shape[1:])

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


@dataclass(frozen=True)
class Contender:
    """logp: log-probs ``[N]``, None if it has none to give. loss: the scalar, if it gives that."""

    name: str
    logp: Callable[[Problem], Tensor] | None
    loss: Callable[[Problem], Tensor] | None = None

    def backward(self, problem: Problem) -> None:
        """Forward and backward: leaves the gradients in the problem's leaves."""
        problem.forget_gradients()
        if self.loss is not None:
            self.loss(problem).backward()
        else:
            assert self.logp is not None
            self.logp(problem).backward(problem.coefficient)


def ours() -> list[Contender]:
    def logp(x: Problem) -> Tensor:
        return linear_logprob(x.hidden, x.weight, x.targets).logp

    def loss(x: Problem) -> Tensor:
        return linear_policy_loss(
            x.hidden, x.weight, x.targets, x.advantages, x.cu_seqlens, options=LossOptions()
        ).loss

    return [Contender(harness.OURS, logp), Contender(FUSED_LOSS, None, loss)]


def naive_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Materialised logits in the dtype of the inputs, softmax in float32."""
    logits = linear(hidden, weight)
    return logits.log_softmax(-1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]


def plain_torch() -> Contender:
    return Contender("torch", lambda x: naive_logp(x.hidden, x.weight, x.targets))


def torch_fp32() -> Contender:
    """Exact products of low-precision inputs: what accuracy costs if memory and time do not."""
    return Contender(
        "torch float32", lambda x: naive_logp(x.hidden.float(), x.weight.float(), x.targets)
    )


def torch_compiled() -> Contender:
    compiled = torch.compile(naive_logp, dynamic=False)
    return Contender("torch.compile", lambda x: compiled(x.hidden, x.weight, x.targets))


def peers(names: Sequence[str], device: str) -> list[Contender]:
    """Those of ``names`` that are installed and run on ``device``; of the others it says why not.

    Each is tried on a tiny problem first: what a peer cannot do is its own affair, and must not
    cost the figures of the rest.
    """
    makers = {"trl": _trl, "liger_kernel": _liger, "cut_cross_entropy": _cut_cross_entropy}
    result = []
    for name in harness.installed(names):
        for contender in makers[name]():
            try:
                _try(contender, device)
            except Exception as error:  # noqa: BLE001 - said, and the peer is left out
                why = str(error).strip().splitlines() or [""]
                print(f"{contender.name}: skipped, {type(error).__name__}: {why[0][:200]}")
            else:
                result.append(contender)
    return result


def _try(contender: Contender, device: str) -> None:
    if contender.name.startswith("cut_cross_entropy") and torch.device(device).type == "cpu":
        raise RuntimeError("its Triton kernels need a GPU")
    dtype = torch.bfloat16
    problem = Problem(
        torch.randn(128, 128, device=device, dtype=dtype).requires_grad_(),
        torch.randn(512, 128, device=device, dtype=dtype),
        torch.randint(512, (128,), device=device),
        torch.randn(2, device=device),
    )
    contender.backward(problem)
    gradient = problem.hidden.grad
    if gradient is None or not gradient.isfinite().all():
        raise RuntimeError("no finite gradient")


def _trl() -> list[Contender]:
    """Its streamed LM head, with the vocabulary tile that its trainers give it."""

    def logp(x: Problem) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        return ChunkedLogProbFunction.apply(
            x.hidden, x.weight, None, x.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ()
        )[0]

    return [Contender("trl", logp)]


def _liger() -> list[Contender]:
    """The chunked GRPO loss (log-probs by the function inside it), and the log-prob op for RL."""

    def logp(x: Problem) -> Tensor:
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

        forward = LigerFusedLinearPPOBase.chunk_forward
        return forward(x.padded(x.hidden), x.weight, x.padded(x.targets)).flatten()

    def loss(x: Problem) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        # Its default is one completion at a time, which would be one row where each has one token.
        module = LigerFusedLinearGRPOLoss(
            beta=0.0,
            use_ref_model=False,
            compiled=x.hidden.is_cuda,
            chunk_size=1 if x.length > 1 else len(x.advantages),
        )
        ids = x.padded(x.targets)
        return module(x.padded(x.hidden), x.weight, ids, torch.ones_like(ids), x.advantages)[0]

    def op_logp(x: Problem) -> Tensor:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Op

        return -Op.apply(x.hidden, x.weight, x.targets)

    return [Contender("liger_kernel", logp, loss), Contender(SCALED_CE, op_logp)]


def _cut_cross_entropy() -> list[Contender]:
    def logp(x: Problem) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none")

    return [Contender("cut_cross_entropy", logp)]


def random_head(N: int, H: int, V: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32 ``hidden [N, H]``, ``weight [V, H]``; logits of standard deviation 0.6 at H=896."""
    device = generator.device
    hidden = torch.randn(N, H, generator=generator, device=device)
    weight = torch.randn(V, H, generator=generator, device=device).mul_(0.02)
    return hidden, weight


def boosted(
    hidden: Tensor, weight: Tensor, logits: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Random tokens ``[N, k]``, all different in a row, lifted to about ``logits [N, k]``:
    ``(hidden, tokens)``."""
    N, k = logits.shape
    hidden, tokens, part = hidden.clone(), [], len(weight) // k
    for i in range(k):
        ids = i * part + torch.randint(part, (N,), generator=generator, device=weight.device)
        w = weight[ids]
        hidden += w * (logits[:, i] / w.square().sum(1))[:, None]
        tokens.append(ids)
    return hidden, torch.stack(tokens, 1)


def one_of(tokens: Tensor, generator: torch.Generator) -> Tensor:
    """``[N]``: one of ``tokens [N, k]`` of each row."""
    N, k = tokens.shape
    choice = torch.randint(k, (N, 1), generator=generator, device=tokens.device)
    return tokens.gather(1, choice)[:, 0]


def peaked_logits(N: int, generator: torch.Generator) -> Tensor:
    """``[N, 3]``: competitors within 4 nats of a top logit between 16 and 31."""
    device = generator.device
    top = 16 + 15 * torch.rand(N, 1, generator=generator, device=device)
    below = 4 * torch.rand(N, 3, generator=generator, device=device)
    below[:, 0] = 0
    return top - below


def out_of_memory(work: Callable[[], Any]) -> bool:
    """Run it; True, with the memory back, if the device had too little."""
    try:
        work()
    except torch.OutOfMemoryError:
        failed = True
    else:
        failed = False
    if failed:  # out of the handler: its traceback holds the tensors
        gc.collect()
        torch.cuda.empty_cache()
    return failed
