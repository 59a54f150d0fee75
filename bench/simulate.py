"""What a step of fusedgrpo allocates on a GPU, without a GPU: the real code on fake tensors.

    python bench/simulate.py qwen2.5-7b --rank 64 --completion 3584

Model, adapter, packed batch, checkpointing, head, loss, backward, clipping, optimizer and sampler
are the product's own; only the tensors are fake, so that a 7B step takes seconds and no memory.
Fake CUDA tensors fail under autograd without a GPU, so the tensors are fake CPU tensors and the
code is made to take its CUDA choices (``simulate_choices.py``). Operators whose fake implementation
hides scratch run their real body, or allocate the scratch that their kernel is known to take.

What it cannot see: the CUDA context, cuBLAS workspaces, fragmentation, Triton's and the driver's
own memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from simulate_choices import FakeOffload, cuda_choices, scratch_bodies
from simulate_models import MODELS, fill, model_config, skeleton
from torch import Tensor
from transformers import masking_utils

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.engine.batch_plan import resolve_batch
from fusedgrpo.engine.entropy_bonus import EntropyBonus
from fusedgrpo.engine.execution import Execution
from fusedgrpo.engine.learner import Learner
from fusedgrpo.engine.memory.oom_retry import OOMRetry
from fusedgrpo.engine.memory.storage_tracker import Peak, StorageTracker, fake_tensors
from fusedgrpo.engine.optimizer import build_optimizer
from fusedgrpo.engine.rollout import decoder_sampler
from fusedgrpo.engine.rollout.decode_loop import How, Limits, hold
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.next_token import NextToken
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.scoring import loss_options
from fusedgrpo.models import decoding
from fusedgrpo.models.activation_offload import OffloadActivations
from fusedgrpo.models.micro_batches import micro_batches
from fusedgrpo.models.policy import Policy
from fusedgrpo.models.token_chooser import TokenChooser

GIB = 2**30


@dataclass
class Simulation:
    """peaks: by phase, in the order they happen. resident: bytes of what stays, by kind. host:
    bytes of host memory that activation offload takes."""

    peaks: dict[str, Peak] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    host: int = 0

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
    update: bool = True,
) -> Simulation:
    """One rollout and one step at full length: every completion of ``max_completion_length``.

    ``rollout_weights: auto`` is the adapter here, ``sampler: auto`` our decoder.

    settings: the model's transformers configuration. in_flight: completions decoded together (all
    if None). offload: what the update saves for its backward pass goes to the host. update: False
    for the rollout alone.
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
        rows = in_flight or batches.groups_per_rollout * config.num_generations
        sampler = None
        if config.sampler != "generate":
            own = "weights for rollouts"
            with tracker.labelled(own):
                sampler = _decoder(run, config, rows)
            gc.collect()
            # These alone: in a first pass bitsandbytes casts biases of 4-bit layers.
            if (size := tracker.alive().get(own)) is not None:
                result.resident[own] = size
        result.peaks["weights"] = _now(tracker)
        if sampler is not None:
            prompt_ids = [[1] * prompt_tokens] * batches.groups_per_rollout
            result.peaks["rollout"] = _decoded(sampler, tracker, config, prompt_ids)
        else:
            result.peaks["rollout"] = _generated(run, tracker, config, prompt_tokens, rows)
        if not update:
            return result
        samples = first_parts(config, samples, run.layout)
        tracker.start_peak()
        with tracker.labelled("scoring"):
            score(run, config, samples)
        result.peaks["scoring"] = tracker.peak
        moved = FakeOffload() if offload else None
        result.peaks |= update_peaks(run, optimizer, tracker, config, samples, moved)
        result.host = moved.host_bytes if moved is not None else 0
    return result


def _now(tracker: StorageTracker) -> Peak:
    gc.collect()
    tracker.start_peak()
    return tracker.peak


def longest_samples(config: GRPOConfig, P: int, prompts: int) -> list[TrainingSample]:
    """One step's samples, all at their limits, each with a gradient."""
    zeros = (0,) * config.max_completion_length
    return [
        TrainingSample((prompt + 1,) * P, zeros, 1.0 if i % 2 else -1.0)
        for prompt in range(prompts)
        for i in range(config.num_generations)
    ]


# --- the phases ---------------------------------------------------------------------------------


def _decoder(run: Policy, config: GRPOConfig, rows: int) -> DecoderSampler:
    """Our decoder, with the weights that it samples from; merged ones if the option says so."""

    def few_tokens(run: Policy, how: How) -> None:
        """In place of a comparison of numbers."""
        params = SamplingParams(max_new_tokens=2)
        hold(run, [[1, 2]], 1, Limits(1, 0, 2), NextToken(run, params), how=how)

    with mock.patch.object(decoder_sampler, "check_decoder", few_tokens):
        return DecoderSampler(
            run,
            NoText(),
            [-1],
            execution=Execution(OOMRetry(config.tokens_per_microbatch or 0, rows)),
            rollout_weights="merged" if config.rollout_weights == "merged" else "adapter",
        )


def _decoded(
    sampler: DecoderSampler, tracker: StorageTracker, config: GRPOConfig, prompts: list[list[int]]
) -> Peak:
    """The decoder's own warm-up after an update: weights are prepared or merged anew, prompts are
    read, and the last token of the longest completions is chosen."""
    sampler.weights_changed()
    tracker.start_peak()
    with tracker.labelled("rollout"):
        sampler.warm_up(prompts, config.num_generations, SamplingParams.of(config))
    return tracker.peak


class NoText:
    """Instead of a tokenizer."""

    pad_token_id = 0
    all_special_ids: tuple[int, ...] = ()
    all_special_tokens: tuple[str, ...] = ()
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def decode(self, ids: Any, **_: Any) -> str:
        return ""


def _generated(
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
        cache = decoding.prefill(model, ids, torch.ones_like(ids), copies)
        length = P + C - 1
        with tracker.labelled("KV cache"):
            for layer in cache.layers:
                shape = (rows, layer.keys.shape[1], length - 1, layer.keys.shape[3])
                layer.keys = layer.keys.new_empty(shape)
                layer.values = layer.values.new_empty(shape)
        chooser = TokenChooser([0] * rows, C, torch.device("cpu"))
        logits = model(
            input_ids=torch.zeros(rows, 1, dtype=torch.int64),
            attention_mask=torch.ones(rows, length, dtype=torch.int64),
            position_ids=torch.full((rows, 1), length - 1),
            past_key_values=cache,
            use_cache=True,
        ).logits
        chooser(ids, logits[:, -1].to(copy=True, dtype=torch.float32))
    return tracker.peak


def score(run: Policy, config: GRPOConfig, samples: list[TrainingSample]) -> None:
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
    samples: list[TrainingSample],
    offload: OffloadActivations | None = None,
) -> dict[str, Peak]:
    """``Learner.step`` as it is, its three phases told apart."""
    assert config.tokens_per_microbatch is not None
    learner = Learner(
        run,
        optimizer,
        _NoSchedule(),
        loss_options(config),
        max_grad_norm=config.max_grad_norm,
        execution=Execution(OOMRetry(config.tokens_per_microbatch)),
        bonus=EntropyBonus(config.entropy_coef),
        seed=config.seed,
        offload=offload,
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
        learner.step(samples, 0)
    begin("")
    return peaks


def first_parts(
    config: GRPOConfig, samples: list[TrainingSample], layout: Any
) -> list[TrainingSample]:
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
    parser.add_argument("--sampler", choices=["generate", "decoder"], default="decoder")
    parser.add_argument("--rollout-weights", choices=["adapter", "merged"], default="adapter")
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--no-4bit", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--top", type=int, default=12)
    args = parser.parse_args()
    config = GRPOConfig(
        load_in_4bit=not args.no_4bit, lora_r=args.rank, num_generations=args.group,
        max_completion_length=args.completion, optim=args.optim,
        tokens_per_microbatch=args.tokens or args.prompt + args.completion,
        gradient_checkpointing=not args.no_checkpointing, sampler=args.sampler,
        rollout_weights=args.rollout_weights,
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
