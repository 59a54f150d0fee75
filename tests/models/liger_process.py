"""Models with and without Liger's layers, its kernels interpreted; see test_liger_layers.py. A
process of its own: the interpreter has to be chosen before Triton is imported."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import interpreted_liger
import tiny
import torch
from cuda_twin.process import leave
from liger_kernel.ops import (
    LigerGELUMulFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
    rope,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.liger_kernels import kernels_left_out
from fusedgrpo.engine.memory.storage_tracker import StorageTracker
from fusedgrpo.models import liger_layers
from fusedgrpo.models.policy import Policy

PAIRS = [((5, 6, 7), (8, 9)), ((5, 6, 7), (11, 12))]


def small(family: str = "Llama") -> Any:
    return tiny.model(family, scale=3.0, num_hidden_layers=1)


def policy(model: Any, ligers: bool, **changes: Any) -> Policy:
    torch.manual_seed(0)
    options: dict[str, Any] = {"bf16": False, "use_cpu": True, "lora_r": 4}
    made = Policy.load(GRPOConfig(use_liger_kernel=ligers, **options | changes), model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.trainable():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return made


def update(made: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and all gradients in a row, of a loss that weighs them differently."""
    with made.training():
        logp = made.logprobs(made.pack(PAIRS)).logp
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    grads = [p.grad.flatten() for _, p in made.trainable() if p.grad is not None]
    return logp.detach(), torch.cat(grads)


def compared(family: str, **changes: Any) -> Any:
    """How far Liger's layers are from the model's own in float32."""
    built = small(family)
    other = copy.deepcopy(built)
    logp, grad = update(policy(built, False, **changes))
    there = policy(other, True, **changes)
    with mock.patch.object(rope, "rope_forward", wraps=rope.rope_forward) as turned:
        found, found_grad = update(there)
    return {
        "ligers": _ligers(there.model),
        "turned": turned.call_count,
        "logp": float((found - logp).abs().max()),
        "grad": float((found_grad - grad).norm() / grad.norm()),
        "left to peft": there.lora.left_to_peft if there.lora else {},
    }


def _ligers(model: Any) -> list[str]:
    forwards = [vars(m)["forward"].__func__ for m in model.modules() if "forward" in vars(m)]
    return sorted({f.__qualname__.split(".")[0] for f in forwards} - {"_give_to_readers"})


def one_route() -> Any:
    """A new adapter is the reference, and the scored log-probs are those of the update."""
    made = Policy.load(
        GRPOConfig(use_liger_kernel=True, bf16=False, use_cpu=True, beta=0.1), small()
    )
    packed = made.pack(PAIRS)
    with made.training():
        trained = made.logprobs(packed).logp.detach()
    with made.scoring():
        scored = made.logprobs(packed).logp
    with made.reference(), made.scoring():
        reference = made.logprobs(packed).logp
    return {"ratio": bool((trained == scored).all()), "kl": bool((trained == reference).all())}


def alone() -> Any:
    """What a model of the family computes that has nothing to do with Liger, before and after one
    has been given its layers; and a frozen copy of the one that has, which keeps them."""
    from transformers.models.llama import modeling_llama

    other = small()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = dict(vars(modeling_llama))
    with torch.no_grad():
        expected = other(ids).logits
        made = policy(small(), True, finetuning_type="full", beta=0.1)
        reference = made.reference_model
        same = bool((made.model(ids).logits == reference(ids).logits).all())
        found = other(ids).logits
    changed = [name for name, x in vars(modeling_llama).items() if before.get(name) is not x]
    bound = {id(vars(m)["forward"].__self__) for m in reference.modules() if "forward" in vars(m)}
    return {
        "same": bool((found == expected).all()),
        "changed": changed,
        "the copy is the same": same,
        "the copy has forwards of its own": bound <= {id(m) for m in reference.modules()},
    }


def only_some() -> Any:
    built = small()
    config = GRPOConfig(
        use_liger_kernel=True, use_cpu=True, liger_kernel_config={"rope": False, "swiglu": False}
    )
    liger_layers.put_into(built, config)
    return _ligers(built)


CALLS = {
    "rms_norm": (LigerRMSNormFunction, ((2, 9, 64), (64,)), (1e-6, 0.0, "llama", True, None)),
    "rms_norm, not in place": (
        LigerRMSNormFunction, ((2, 9, 64), (64,)), (1e-6, 1.0, "gemma", False, None),
    ),
    "rope": (LigerRopeFunction, ((2, 4, 9, 16), (2, 2, 9, 16), (2, 9, 16), (2, 9, 16)), ()),
    "swiglu": (LigerSiLUMulFunction, ((2, 9, 96), (2, 9, 96)), (1.0, 1.0)),
    "geglu": (LigerGELUMulFunction, ((2, 9, 96), (2, 9, 96)), ()),
}  # fmt: skip


@contextlib.contextmanager
def unwatched_kernels() -> Iterator[None]:
    """Inside, what the interpreter copies is nobody's memory."""
    executor: Any = importlib.import_module("triton.runtime.interpreter").GridExecutor
    plain = executor.__call__

    def launch(*args: Any, **options: Any) -> None:
        with no_dispatch():
            plain(*args, **options)

    with mock.patch.object(executor, "__call__", launch):
        yield


def memory(name: str, planned: bool) -> Any:
    """Bytes that a call keeps for its backward pass, and the most that call and backward pass
    allocate: computed, or as the memory plan runs it."""
    function, shapes, options = CALLS[name]
    tracker = StorageTracker()
    with contextlib.ExitStack() as stack:
        if planned:
            stack.enter_context(kernels_left_out())
            stack.enter_context(FakeTensorMode())
        else:
            stack.enter_context(unwatched_kernels())
        inputs = [torch.ones(shape, dtype=torch.bfloat16) for shape in shapes]
        if name == "rope":  # as attentions have them
            inputs[:2] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
        given = [x.requires_grad_() * 1 for x in inputs[:2]]
        kept = 0
        stack.enter_context(tracker)

        def note(x: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += x.untyped_storage().nbytes()
            return x

        before = tracker.live
        tracker.start_peak()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            outputs = function.apply(*given, *inputs[2:], *options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        forward = tracker.peak.bytes - before
        tracker.start_peak()
        torch.autograd.grad(outputs, given, [torch.ones_like(x) for x in outputs])
        return {"kept": kept, "forward": forward, "backward": tracker.peak.bytes - before}


SCENARIOS = {
    **{f: lambda f=f: compared(f) for f in ("Llama", "Qwen3", "Gemma2")},
    "not checkpointed": lambda: compared("Llama", gradient_checkpointing=False),
    "full": lambda: compared("Llama", finetuning_type="full"),
    "one route": one_route,
    "alone": alone,
    "only some": only_some,
    **{
        f"memory of {n}": lambda n=n: {"planned": memory(n, True), "computed": memory(n, False)}
        for n in CALLS
    },
}

if __name__ == "__main__":
    interpreted_liger.install()
    leave(SCENARIOS)
