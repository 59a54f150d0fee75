"""What a step of fusedgrpo allocates on a GPU, without a GPU: the real code on fake tensors.

    python bench/simulate.py qwen2.5-7b --rank 64 --completion 3584

Model, adapter, packed batch, checkpointing, head, loss, backward, clipping, optimizer and sampler
are the product's own; only the tensors are fake, so that a 7B step takes seconds and no memory.
Fake CUDA tensors fail under autograd without a GPU, so the tensors are fake CPU tensors and the
code is made to take its CUDA choices (``cuda_choices``). Operators whose fake implementation hides
scratch run their real body, or allocate the scratch that their kernel is known to take
(``scratch_bodies``).

What it cannot see: the CUDA context, cuBLAS workspaces, fragmentation, Triton's and the driver's
own memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import masking_utils

from fusedgrpo.engine import sampler as sampling
from fusedgrpo.engine import update
from fusedgrpo.engine.config import GRPOConfig
from fusedgrpo.engine.memory_guard import MemoryGuard
from fusedgrpo.engine.optim import build_optimizer
from fusedgrpo.engine.plan_batch import resolve_batch
from fusedgrpo.engine.samples import Sample
from fusedgrpo.engine.scoring import loss_options
from fusedgrpo.engine.update import Updater
from fusedgrpo.kernels import linear_logprob_backward as head_backward
from fusedgrpo.kernels import tiles_triton, vocab_pass
from fusedgrpo.kernels.launch import tiling
from fusedgrpo.models import attention, loading, policy, precision
from fusedgrpo.models.packing import micro_batches
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.storage_tracker import Peak, StorageTracker, fake_tensors

# The package gives the function's name to the function.
head_op = importlib.import_module("fusedgrpo.kernels.linear_logprob")

GIB = 2**30

# config.json of each, as published.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 1536,
        "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "tie_word_embeddings": False, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "qwen2.5-14b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 5120,
        "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "tie_word_embeddings": False, "max_position_embeddings": 32768,
        "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    },
    "llama-3.2-3b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    },
}  # fmt: skip


def model_config(name: str, **changes: Any) -> Any:
    """The transformers configuration of a model in ``MODELS``."""
    from transformers import AutoConfig

    values = MODELS[name] | changes
    return AutoConfig.for_model(**values)


@dataclass
class Simulation:
    """peaks: by phase, in the order they happen. resident: bytes of what stays, by kind."""

    peaks: dict[str, Peak] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)

    @property
    def highest(self) -> int:
        return max(peak.bytes for peak in self.peaks.values())


def simulate(
    config: GRPOConfig,
    settings: Any,
    *,
    prompt_tokens: int,
    in_flight: int | None = None,
    offload: bool = False,
) -> Simulation:
    """One rollout and one step at full length: every completion of ``max_completion_length``.

    settings: the model's transformers configuration. in_flight: completions decoded together (all
    if None). offload: the inputs of checkpointed layers on the host, see ``offloaded``.
    """
    assert config.tokens_per_microbatch is not None
    batches = resolve_batch(config, 1 << 30)
    prompts = batches.groups_per_step
    result = Simulation()
    samples = longest_samples(config, prompt_tokens, prompts)
    tracker = StorageTracker(scratch_bodies())
    with cuda_choices(), contextlib.ExitStack() as faked:
        model = skeleton(config, settings)
        faked.enter_context(fake_tensors(tracker))
        fill(model, tracker.labelled)
        with tracker.labelled("adapter"):
            run = Policy.load(config, model)
        del model
        gc.collect()
        result.resident = tracker.alive()
        with tracker.labelled("optimizer"):
            optimizer = build_optimizer(config, run.trainable())
        result.resident = tracker.alive()
        result.peaks["weights"] = _now(tracker)
        rows = in_flight or batches.groups_per_rollout * config.num_generations
        result.peaks["rollout"] = _rollout(run, tracker, config, prompt_tokens, rows)
        samples = first_parts(config, samples, run.layout)
        tracker.start_peak()
        with tracker.labelled("scoring"):
            score(run, config, samples)
        result.peaks["scoring"] = tracker.peak
        with offloaded(run) if offload else contextlib.nullcontext():
            result.peaks |= update_peaks(run, optimizer, tracker, config, samples)
    return result


def _now(tracker: StorageTracker) -> Peak:
    gc.collect()
    tracker.start_peak()
    return tracker.peak


def longest_samples(config: GRPOConfig, P: int, prompts: int) -> list[Sample]:
    """One step's samples, all at their limits, each with a gradient."""
    zeros = (0,) * config.max_completion_length
    return [
        Sample((prompt + 1,) * P, zeros, 1.0 if i % 2 else -1.0)
        for prompt in range(prompts)
        for i in range(config.num_generations)
    ]


# --- the model ----------------------------------------------------------------------------------


def skeleton(config: GRPOConfig, settings: Any) -> Any:
    """The model that ``load_model`` makes of ``settings``, on the meta device; in 4 bits through
    transformers' own replacement of layers."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    dtype = loading.weights_dtype(config, torch.device("cuda"))
    if dtype == "auto":
        dtype = settings.get_text_config().dtype
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            settings, dtype=dtype, attn_implementation=config.attn_implementation or "sdpa"
        )
    if config.load_in_4bit:
        quantization = loading._four_bit(config, torch.device("cuda"))
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), quantization)
        model.is_loaded_in_4bit = True
    return model


def fill(model: Any, labelled: Any, device: str = "cpu") -> None:
    """Weights for a skeleton, fake or random; those of 4-bit layers quantised by bitsandbytes.

    labelled: a function of the kind of weight that gives a context.
    """
    import bitsandbytes as bnb

    model.hf_device_map = {"": device}  # it is where it belongs
    done: dict[int, Any] = {}  # tied weights are one
    head = model.get_output_embeddings()
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if id(old) not in done:
                kind = "weights, norms and biases"
                if isinstance(old, bnb.nn.Params4bit):
                    kind = "weights, 4 bit"
                elif module is head or isinstance(module, torch.nn.Embedding):
                    kind = "weights, embeddings and head"
                with labelled(kind):
                    done[id(old)] = _filled(old, device)
            setattr(module, name, done[id(old)])
        for name, buffer in list(module.named_buffers(recurse=False)):
            with labelled("weights, norms and biases"):
                new = torch.ones(buffer.shape, dtype=buffer.dtype, device=device)
                module.register_buffer(name, new, persistent=False)
        if isinstance(module, bnb.nn.Linear4bit):
            module.quant_state = module.weight.quant_state


def _filled(old: Any, device: str) -> torch.nn.Parameter:
    import bitsandbytes as bnb

    if not isinstance(old, bnb.nn.Params4bit):
        new = torch.empty(old.shape, dtype=old.dtype, device=device).normal_(std=0.02)
        return torch.nn.Parameter(new, requires_grad=old.requires_grad)
    packed, state = bnb.functional.quantize_4bit(
        torch.empty(old.shape, dtype=torch.bfloat16, device=device).normal_(std=0.02),
        compress_statistics=old.compress_statistics,
        quant_type=old.quant_type,
    )
    # Params4bit cannot hold a fake tensor; a plain parameter that knows the same does.
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage"):
        setattr(weight, name, getattr(old, name))
    weight.bnb_quantized, weight.quant_state = True, state
    return weight


# --- CUDA's choices on fake CPU tensors ---------------------------------------------------------


class _NoLaunch:
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

        # Loading: the device's number formats; checks that need numbers are left out.
        patch(precision, "has_native_bfloat16", lambda device_type: True)
        patch(loading, "check_head", lambda model: None)
        # Moving a fake parameter fails, and all of them are where and what they have to be.
        patch(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
        patch(policy, "choose_layout", _layout)
        patch(torch, "is_autocast_enabled", lambda device="cpu": autocast_on(_cpu(device)))
        # Attention: the varlen kernel, and gather with its own backward.
        patch(FakeTensor, "is_cuda", True, create=True)
        patch(attention, "_varlen_kernel", lambda *args: attention._torch_varlen)
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
        for kernel in ("softmax_tile_kernel", "moment_tile_kernel", "rescale_kernel",
                       "finish_kernel"):  # fmt: skip
            patch(tiles_triton, kernel, _NoLaunch())
        # Numbers that are asked for, and a mask whose length depends on some.
        patch(update, "loss_mask", _loss_mask)
        patch(FakeTensor, "tolist", lambda self: _ones(tuple(self.shape)))
        patch(FakeTensor, "item", lambda self: 1.0, create=True)
        yield


def _cpu(device: str) -> str:
    return "cpu" if device == "cuda" else device


def _layout(run: Policy, shared_prompt: str) -> str:
    """``choose_layout`` without its comparison of numbers."""
    attention.install(run.causal_lm)
    return "packed" if shared_prompt == "off" else "shared"


def _cuda_tiling(weight: Tensor) -> Any:
    V, H = weight.shape
    return tiling(H, V, weight.dtype.itemsize, "cuda")


def _loss_mask(samples: Sequence[Sample], device: torch.device) -> Tensor:
    return torch.ones(sum(len(s.completion_ids) for s in samples), dtype=torch.bool, device=device)


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1.0


def _efficient_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Without gradients: the kernels of SDPA on a GPU keep no scores."""
    assert not torch.is_grad_enabled()
    query.new_empty(query.shape[:-1], dtype=torch.float32)  # log-sum-exp
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def scratch_bodies() -> dict[Any, Callable[..., Any]]:
    """By operator: what it allocates on a GPU."""
    import bitsandbytes  # noqa: F401  (registers its operators)
    from torch.nn.attention import varlen  # noqa: F401

    ops = torch.ops
    return {
        ops.fusedgrpo.linear_logprob.default: head_op._linear_logprob._init_fn,
        ops.fusedgrpo.scale_rows.default: head_backward.scale_rows._init_fn,
        ops.torch_attn._varlen_attn_backward.default: _varlen_backward,
        ops.bitsandbytes.gemm_4bit.default: _gemm_4bit,
    }


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


# --- the phases ---------------------------------------------------------------------------------


def _rollout(
    run: Policy,
    tracker: StorageTracker,
    config: GRPOConfig,
    P: int,
    rows: int,
) -> Peak:
    """Prefill, and the last token of the longest completions: the cache is at its fullest."""
    C = config.max_completion_length
    groups = max(rows // config.num_generations, 1)
    model = run.causal_lm
    tracker.start_peak()
    with (
        run.scoring(),
        run.autocast(),
        tracker.labelled("rollout"),
        # Whether a mask hides anything is asked of its numbers: only of prompts of unlike lengths.
        mock.patch.object(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: groups == 1),
    ):
        ids = torch.zeros(groups, P, dtype=torch.int64)
        copies = torch.zeros(rows, dtype=torch.int64)
        cache = sampling.GenerateSampler._prefill(model, ids, torch.ones_like(ids), copies)
        length = P + C - 1
        with tracker.labelled("KV cache"):
            for layer in cache.layers:
                shape = (rows, layer.keys.shape[1], length - 1, layer.keys.shape[3])
                layer.keys = layer.keys.new_empty(shape)
                layer.values = layer.values.new_empty(shape)
        params = sampling.SamplingParams(max_new_tokens=C)
        chooser = sampling._Chooser(params, [0] * rows, torch.device("cpu"), lambda: None)
        logits = model(
            input_ids=torch.zeros(rows, 1, dtype=torch.int64),
            attention_mask=torch.ones(rows, length, dtype=torch.int64),
            position_ids=torch.full((rows, 1), length - 1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        chooser(ids, logits[:, -1].to(copy=True, dtype=torch.float32))
    return tracker.peak


def score(run: Policy, config: GRPOConfig, samples: list[Sample]) -> None:
    """The log-probs of a first micro-batch, as ``rollout_logprobs`` computes them."""
    assert config.tokens_per_microbatch is not None
    pairs = [sample.pair for sample in samples]
    with run.scoring():
        for members in micro_batches(pairs, config.tokens_per_microbatch, run.layout)[:1]:
            run.logprobs(run.pack([pairs[k] for k in members]))


class _NoSchedule:
    def step(self) -> None:
        pass


def update_peaks(
    run: Policy,
    optimizer: Any,
    tracker: Any,
    config: GRPOConfig,
    samples: list[Sample],
) -> dict[str, Peak]:
    """``Updater.step`` as it is, its three phases told apart."""
    assert config.tokens_per_microbatch is not None
    updater = Updater(
        run,
        optimizer,
        _NoSchedule(),
        loss_options(config),
        max_grad_norm=config.max_grad_norm,
        guard=MemoryGuard(config.tokens_per_microbatch),
        entropy_coef=config.entropy_coef,
        seed=config.seed,
    )
    peaks: dict[str, Peak] = {}

    def begin(name: str) -> None:
        label = tracker.label
        if label and (label not in peaks or tracker.peak.bytes > peaks[label].bytes):
            peaks[label] = tracker.peak
        tracker.label = name
        tracker.start_peak()

    def announced(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin(name)
            return method(*args, **kwargs)

        return call

    forward, backward = Policy.logprobs, Tensor.backward
    with (
        mock.patch.object(Policy, "logprobs", announced("update forward", forward)),
        mock.patch.object(Tensor, "backward", announced("update backward", backward)),
        mock.patch.object(optimizer, "step", announced("optimizer step", optimizer.step)),
    ):
        updater.step(samples, 0)
    begin("")
    return peaks


@contextlib.contextmanager
def offloaded(run: Policy) -> Iterator[None]:
    """Checkpointing as it is with activation offload: a layer's input leaves the GPU while the next
    layer runs, and the next one's comes back while a layer is recomputed."""
    with contextlib.ExitStack() as stack:
        moving: collections.deque[Tensor] = collections.deque(maxlen=1)
        trigger = torch.empty(0, requires_grad=True)  # the embedding's output has no gradient

        def checkpoint(layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            moving.append(hidden)
            return _Recomputed.apply(layer, hidden, trigger, moving)

        for module in run.model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                stack.enter_context(
                    mock.patch.object(module, "_gradient_checkpointing_func", checkpoint)
                )
        yield


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Any, hidden: Tensor, trigger: Tensor, moving: Any) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, hidden.shape, hidden.dtype
        ctx.moving = moving
        return layer(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        ctx.moving.clear()
        hidden = torch.empty(ctx.shape, dtype=ctx.dtype).requires_grad_()
        next_one = torch.empty(ctx.shape, dtype=ctx.dtype)
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            out = ctx.layer(hidden)
        torch.autograd.backward(out, grad)
        del next_one
        assert hidden.grad is not None
        return None, hidden.grad, None, None


def first_parts(config: GRPOConfig, samples: list[Sample], layout: Any) -> list[Sample]:
    """Those of the first two micro-batches: the second one finds gradients, and the rest is like
    it."""
    assert config.tokens_per_microbatch is not None
    pairs = [sample.pair for sample in samples]
    parts = micro_batches(pairs, config.tokens_per_microbatch, layout)[:2]
    return [samples[i] for part in parts for i in part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=3584)
    parser.add_argument("--tokens", type=int, help="per micro-batch; default: one sequence")
    parser.add_argument("--in-flight", type=int)
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--no-4bit", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--top", type=int, default=12)
    args = parser.parse_args()
    config = GRPOConfig(
        load_in_4bit=not args.no_4bit, lora_r=args.rank, num_generations=args.group,
        max_completion_length=args.completion, optim=args.optim,
        tokens_per_microbatch=args.tokens or args.prompt + args.completion,
        gradient_checkpointing=not args.no_checkpointing,
    )  # fmt: skip
    result = simulate(
        config, model_config(args.model), prompt_tokens=args.prompt, in_flight=args.in_flight
    )
    for kind, size in result.resident.items():
        print(f"{size / GIB:8.3f} GiB  {kind}")
    for name, peak in result.peaks.items():
        print(f"\n{name}: {peak.bytes / GIB:.3f} GiB")
        print("   ", {k: f"{v / GIB:.3f}" for k, v in peak.by_label().items()})
        rows = sorted(peak.alive.items(), key=lambda item: -item[1])
        rows = [r for r in rows if not r[0].label.startswith(("weights", "adapter", "optimizer"))
                or r[0].label == "optimizer step"]  # fmt: skip
        for origin, size in rows[: args.top]:
            print(f"    {size / 2**20:9.1f} MiB  {origin.op} {origin.dtype} {list(origin.shape)}"
                  f" [{origin.label}]")  # fmt: skip


if __name__ == "__main__":
    main()
