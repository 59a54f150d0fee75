"""What TRL's update step allocates on a GPU, by the means of ``simulate.py``.

Of TRL run its fused LM head (``add_fused_lm_head``, ``ChunkedLogProbFunction`` forward and
backward), ``GRPOTrainer._compute_loss`` with ``_get_per_token_logps_and_entropies``, and its
``GRPOConfig``; of transformers, peft and bitsandbytes the model, its checkpointing, SDPA attention,
the adapters and the 4-bit layers; of torch clipping and fused AdamW, the Trainer's default. The
trainer is not constructed: the lines of its constructor and of ``Trainer`` that make model,
adapters (bfloat16 with 4-bit weights), checkpointing and optimizer are repeated here, the
accelerator is a stand-in. Sampling and scoring are left out.

In TRL's favour: weights beside the 4-bit ones in their stored 16 bits (its default is float32), the
adapter and its states in bfloat16 as it makes them, and no padding at all, so that attention is
FlashAttention without a mask and without repeated key heads.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from simulate import Simulation
from simulate_choices import NoLaunch, cuda_choices, scratch_bodies
from simulate_models import fill, skeleton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import masking_utils

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.memory.storage_tracker import StorageTracker, fake_tensors


def simulate_trl(config: GRPOConfig, settings: Any, *, prompt_tokens: int, rows: int) -> Simulation:
    """The step of ``simulate`` by TRL, with ``rows`` sequences in a micro-batch.

    config: of ours, for model, adapter, group size and lengths. Phases: weights, update forward,
    update backward, optimizer step.
    """
    G, P, C = config.num_generations, prompt_tokens, config.max_completion_length
    result = Simulation()
    tracker = StorageTracker(scratch_bodies() | _bodies())
    with cuda_choices(), trl_choices(rows * C), contextlib.ExitStack() as faked:
        model = skeleton(config, settings)
        faked.enter_context(fake_tensors(tracker))
        fill(model, tracker.labelled)
        with tracker.labelled("adapter"):
            trainer = _trainer(model, config, rows)
        model = trainer.model
        gc.collect()
        trained = [p for p in model.parameters() if p.requires_grad]
        with tracker.labelled("optimizer"):
            optimizer = torch.optim.AdamW(trained, fused=True)
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # makes its states
            optimizer.zero_grad()
        gc.collect()
        result.resident = tracker.alive()
        tracker.start_peak()
        result.peaks["weights"] = tracker.peak
        inputs = {
            "prompt_ids": torch.zeros(rows, P, dtype=torch.int64),
            "prompt_mask": torch.ones(rows, P, dtype=torch.int64),
            "completion_ids": torch.zeros(rows, C, dtype=torch.int64),
            "completion_mask": torch.ones(rows, C, dtype=torch.int64),
            "advantages": torch.ones(rows),
            "num_items_in_batch": torch.ones((), dtype=torch.int64),
        }

        def phase(name: str, work: Callable[[], Any]) -> Any:
            tracker.start_peak()
            with tracker.labelled(name):
                done = work()
            if name not in result.peaks or tracker.peak.bytes > result.peaks[name].bytes:
                result.peaks[name] = tracker.peak
            return done

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

        for _ in range(min(G // rows, 2)):  # the second one finds gradients
            loss = phase("update forward", lambda: trainer._compute_loss(model, inputs))
            phase("update backward", loss.backward)
            del loss
        phase("optimizer step", clip_and_step)
    return result


def _trainer(model: Any, config: GRPOConfig, rows: int) -> Any:
    """A GRPOTrainer with what ``_compute_loss`` looks at, and its model as the constructor and
    ``Trainer`` prepare it."""
    import trl
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    peft_config = LoraConfig(
        r=config.lora_r, lora_alpha=2 * config.lora_r, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings():
        # peft and TRL use names that transformers has deprecated since.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, peft_config)
        args = trl.GRPOConfig(
            output_dir="unused", use_cpu=True, report_to="none",
            per_device_train_batch_size=rows, num_generations=config.num_generations,
            gradient_accumulation_steps=config.num_generations // rows,
        )  # fmt: skip
    model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad and config.load_in_4bit:
            parameter.data = parameter.data.to(torch.bfloat16)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy"))
    model.activation_checkpointing_enable()
    model.train()
    trainer: Any = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    vars(trainer).update(
        model=model,
        args=args,
        accelerator=SimpleNamespace(
            autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            num_processes=1,
            is_main_process=False,
        ),
        state=SimpleNamespace(global_step=0),
        aux_loss_enabled=False,
        top_entropy_quantile=args.top_entropy_quantile,
        off_policy_mask_threshold=args.off_policy_mask_threshold,
        importance_sampling_level=args.importance_sampling_level,
        beta=args.beta,
        loss_type=args.loss_type,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        use_vllm=False,
        current_gradient_accumulation_steps=args.gradient_accumulation_steps,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    return trainer


# --- CUDA's choices in TRL's code -------------------------------------------------------------


@contextlib.contextmanager
def trl_choices(scored: int) -> Iterator[None]:
    """Inside ``cuda_choices``: TRL takes its Triton way, and masks select ``scored`` tokens."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    select = Tensor.__getitem__

    def getitem(tensor: Tensor, key: Any) -> Tensor:
        if isinstance(key, Tensor) and key.dtype == torch.bool:
            return _Masked.apply(tensor, key, scored)
        return select(tensor, key)

    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, new: Any, **options: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, new, **options))

        for module in (chunked_logprob, utils):
            patch(module, "_use_triton", lambda device: True)
        for kernel in ("_forward_kernel", "_backward_kernel"):
            patch(chunked_logprob, kernel, NoLaunch())
        # On CUDA one GEMM into what is there already.
        patch(chunked_logprob, "_addmm_fp32", lambda acc, a, b: None)
        patch(torch.nn.functional, "scaled_dot_product_attention", _flash_attention)
        # No row is padded.
        patch(masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: True)
        # What a fake mask cannot tell.
        patch(FakeTensor, "__getitem__", getitem, create=True)
        patch(FakeTensor, "__bool__", lambda self: True, create=True)
        yield


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    assert attn_mask is None and query.dtype == torch.bfloat16
    op = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = op(query, key, value, dropout_p, is_causal)[0]
    return out


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Any:
    """Results, and the scratch of FlashAttention 2 (flash_api.cpp, ``mha_bwd``): dq in float32, a
    row of sums, and with grouped heads the gradients of keys and values per query head."""
    B, heads, S, D = query.shape
    S = -(-S // 128) * 128
    shapes = (B, heads, S), (B, S, heads, D)
    scratch = [query.new_empty(shape, dtype=torch.float32) for shape in shapes]
    results = [torch.empty_like(x) for x in (query, key, value)]
    if key.shape[1] != heads:
        scratch += [x.new_empty((B, x.shape[2], heads, D)) for x in (key, value)]
    return tuple(results)


def _bodies() -> dict[Any, Callable[..., Any]]:
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
        aten.masked_scatter_backward.default: lambda grad, mask, sizes: grad.new_empty(sizes),
    }


class _Masked(torch.autograd.Function):
    """``tensor[mask]`` with ``count`` places: indices, the rows; backward, a tensor of zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mask: Tensor, count: int) -> Tensor:
        ctx.tensor_shape = tensor.shape
        indices = mask.new_empty((mask.dim(), count), dtype=torch.int64)
        rows = tensor.new_empty((count, *tensor.shape[mask.dim() :]))
        del indices
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.new_zeros(ctx.tensor_shape), None, None
