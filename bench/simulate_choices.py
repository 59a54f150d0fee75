"""CUDA choices on fake CPU tensors, for ``simulate.py``, and the scratch of CUDA kernels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, disable_fake_tensor_cache

from fusedgrpo import host
from fusedgrpo.engine import learner
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.kernels.decode import attention_triton as decode_triton
from fusedgrpo.kernels.launch import tiling
from fusedgrpo.kernels.logprob import backward as head_backward
from fusedgrpo.kernels.logprob import finish_triton, softmax_triton, tiles_triton, vocab_pass
from fusedgrpo.kernels.sample import best, best_triton
from fusedgrpo.kernels.sample import logits as sample_logits
from fusedgrpo.kernels.sample import op as sample_op
from fusedgrpo.models import activation_offload as offload
from fusedgrpo.models import cached_attention, loading, policy, varlen_attention
from fusedgrpo.models import packed_attention as attention
from fusedgrpo.models.adapters import merged_weights, rollout_weights
from fusedgrpo.models.device import pick_compute_dtype
from fusedgrpo.models.policy import Policy

# The package gives the function's name to the function.
head_op = importlib.import_module("fusedgrpo.kernels.logprob.op")


class NoLaunch:
    """Instead of a Triton kernel: what it writes was allocated by its caller."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def cuda_choices() -> Iterator[None]:
    """Inside, the product's code chooses on fake CPU tensors as on a recent GPU."""
    import bitsandbytes as bnb

    if not bnb.functional.name2qmap:
        bnb.functional.name2qmap["dynamic"] = bnb.functional.create_dynamic_map()
    autocast_on = torch.is_autocast_enabled
    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, new: Any, **options: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, new, **options))

        # Of this machine nothing is asked: bfloat16 is there, and a GPU is not.
        patch(host, "has_bfloat16", lambda device: True)
        patch(host, "has_gpu", lambda: False)
        # bitsandbytes asks it for every 4-bit layer that it makes, and repacks some by the answer.
        patch(bnb.nn.modules, "has_avx512bf16", lambda: False)
        # Loading: the number formats of a GPU; checks that need numbers are left out.
        patch(loading, "pick_compute_dtype", _of_a_gpu)
        # Comparisons of numbers, of which there are none here.
        patch(loading, "check_head", lambda model: None)
        patch(loading, "check_causal", lambda model: None)
        patch(loading, "computes_otherwise_in_training", lambda model, decoder: False)
        # Moving a fake parameter fails, and all of them are where and what they have to be.
        patch(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
        patch(policy, "choose_layout", _layout)
        patch(torch, "is_autocast_enabled", lambda device="cpu": autocast_on(_cpu(device)))
        # Attention: the varlen kernel, and gather with its own backward.
        patch(FakeTensor, "is_cuda", True, create=True)
        patch(attention, "varlen_kernel", lambda *args: varlen_attention._torch_varlen)
        patch(torch.nn.functional, "scaled_dot_product_attention", _efficient_attention)
        # Head: CUDA's tiles, 16 bit operands, Triton between the GEMMs.
        patch(vocab_pass, "operand_dtype", lambda x: x.dtype)
        patch(vocab_pass, "mm_into", lambda *args, **kwargs: None)
        patch(vocab_pass, "tile_functions", lambda backend: tiles_triton)
        for module in (vocab_pass, head_op):
            patch(module, "tiling_for", _cuda_tiling)
        for module in (head_op, head_backward):
            patch(module, "plain_arithmetic_on", lambda x: torch.autocast("cpu", enabled=False))
        patch(head_op, "check_targets", lambda target, vocab: None)
        for kernel in ("softmax_tile_kernel", "moment_tile_kernel", "rescale_kernel"):
            patch(softmax_triton, kernel, NoLaunch())
        patch(finish_triton, "finish_kernel", NoLaunch())
        patch(best_triton, "best_tile_kernel", NoLaunch())
        patch(decode_triton, "prompt_kernel", NoLaunch())
        patch(decode_triton, "own_kernel", NoLaunch())
        patch(decode_triton, "merge_kernel", NoLaunch())
        # Tokens: Triton's tiles from hidden states, torch's from rows of logits.
        for module in (sample_op, cached_attention):
            patch(module, "resolve_backend", lambda *_: "triton")
        patch(sample_op, "tiling_for", _cuda_tiling)
        patch(sample_logits, "best_functions", lambda *_: best)
        patch(sample_logits, "CACHED", sample_logits.LAUNCHED)
        for module in (sample_op, sample_logits):
            patch(module, "plain_arithmetic_on", lambda x: torch.autocast("cpu", enabled=False))
        # Rollouts: products as on a GPU. Addresses of fake weights say nothing.
        stacked = property(lambda family: True, lambda family, value: None)
        patch(merged_weights._MergedFamily, "stacked", stacked, create=True)
        patch(rollout_weights.RolloutWeights, "_trained_state", lambda weights: "fake")
        # Offload: what moves are plain tensors, and here these are fake.
        patch(offload, "Tensor", FakeTensor)
        # Numbers that are asked for, and a mask whose length depends on some.
        patch(learner, "loss_mask", _loss_mask)
        patch(FakeTensor, "tolist", lambda self: _ones(tuple(self.shape)))
        patch(FakeTensor, "item", lambda self: 1.0, create=True)
        yield


def _of_a_gpu(bf16: bool | None, fp16: bool, device: torch.device) -> torch.dtype | None:
    return pick_compute_dtype(bf16, fp16, torch.device("cuda"))


def _cpu(device: str) -> str:
    return "cpu" if device == "cuda" else device


def _layout(run: Policy, shared_prompt: str) -> str:
    """``choose_layout`` without its comparison of numbers."""
    attention.install(run.causal_lm)
    return "packed" if shared_prompt == "off" else "shared"


def _cuda_tiling(weight: Tensor) -> Any:
    V, H = weight.shape
    return tiling(H, V, weight.dtype.itemsize, "cuda")


def _loss_mask(samples: Sequence[TrainingSample], device: torch.device) -> Tensor:
    return torch.ones(sum(len(s.completion_ids) for s in samples), dtype=torch.bool, device=device)


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Without gradients: the kernels of SDPA on a GPU keep no scores."""
    assert not torch.is_grad_enabled()
    query.new_empty(query.shape[:-1], dtype=torch.float32)  # log-sum-exp
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


class FakeOffload(offload.OffloadActivations):
    """The product's own, with host memory that no tracker counts and copies that nobody makes."""

    def __init__(self) -> None:
        super().__init__("cpu", streams=_HostOnly())

    def _moves(self, tensor: Tensor) -> bool:
        # A fake parameter is no class of its own.
        return not isinstance(tensor, torch.nn.Parameter) and super()._moves(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        # Fake operators are remembered with their arguments, and set_ has a storage among them.
        mode = active_fake_mode()
        assert mode is not None
        with disable_fake_tensor_cache(mode):
            return super()._unpack(packed)


class _HostOnly:
    def new_chunk(self) -> Tensor:
        return torch.empty(offload.CHUNK, dtype=torch.uint8, device="meta")

    def copy(self, pairs: Any) -> bool:
        return True

    def wait(self, event: Any) -> None:
        pass


def scratch_bodies() -> dict[Any, Callable[..., Any]]:
    """By operator: what it allocates on a GPU."""
    import bitsandbytes  # noqa: F401  (registers its operators)
    from torch.nn.attention import varlen  # noqa: F401

    ops = torch.ops
    return {
        ops.fusedgrpo.linear_logprob.default: head_op._linear_logprob._init_fn,
        ops.fusedgrpo.scale_rows.default: head_backward.scale_rows._init_fn,
        ops.fusedgrpo.linear_sample.default: sample_op._linear_sample._init_fn,
        ops.fusedgrpo.decode_attention.default: _decode_attention,
        ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
        ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
        ops.aten.sort.default: _sort,
    }


def _decode_attention(query: Tensor, *arguments: Any) -> Tensor:
    *tensors, _ = arguments  # the backend
    return decode_triton.decode_attention_triton(query, *tensors)


def _sort(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Several rows are sorted as one (SortStable.cu, ``segmented_sort_pairs_by_full_sort``): int2
    of row and column, before and after, the sorted numbers, and what cub's radix sort alternates
    with."""
    scratch = [x.new_empty(2 * x.numel(), dtype=torch.int32) for _ in range(2)]
    scratch += [torch.empty_like(x), torch.empty_like(x)]
    scratch.append(x.new_empty(2 * x.numel(), dtype=torch.int32))
    out = torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)
    scratch.clear()
    return out


def _varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    """FlashAttention 2: dq in float32, a row of sums, and with fewer key heads than query heads
    the gradients of keys and values per query head (flash_api.cpp, ``mha_varlen_bwd``)."""
    _, _, cu_q, *_ = rest
    total = q.shape[0] + 128 * (len(cu_q) - 1)
    scratch = [q.new_empty((total, q.shape[1]), dtype=torch.float32)]
    scratch.append(q.new_empty((total, *q.shape[1:]), dtype=torch.float32))
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if k.shape[1] != q.shape[1]:
        scratch += [x.new_empty((x.shape[0], q.shape[1], x.shape[2])) for x in (k, v)]
    return torch.empty_like(q), dk, dv


def _gemm_4bit(
    A: Tensor, B: Tensor, shape: Any, absmax: Tensor, blocksize: int, quant_type: str,
    bias: Tensor | None = None, absmax_8bit: Tensor | None = None, absmax_code: Any = None,
    absmax_offset: Any = None,
) -> Tensor:  # fmt: skip
    """bitsandbytes' way for more rows than its fused kernels take (which ones is a matter of the
    GPU, and saves at most one weight matrix): dequantise, then a GEMM."""
    if absmax_8bit is not None:
        scales = torch.empty_like(absmax_8bit, dtype=torch.float32)
        scales = scales + absmax_offset  # alive, like the former ones, until the product is there
    weight = torch.empty(shape, dtype=A.dtype, device=A.device)
    return torch.nn.functional.linear(A, weight, bias)
