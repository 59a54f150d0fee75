"""The worst case first: what will not fit into memory fails before step 1, not at step 600.

One decode batch and one micro-batch at the greatest lengths that the configuration and the data
allow, with random tokens and without a trace: no weight, seed, counter or metric knows of it. What
does not fit is halved here already, as it would be later.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fusedgrpo.engine.memory.oom_retry import release
from fusedgrpo.engine.rollout.sampler import Sampler, SamplingParams
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.engine.seeding import derive, seeded
from fusedgrpo.models.micro_batches import forwarded_tokens, longest, micro_batches

if TYPE_CHECKING:
    from fusedgrpo.engine.learner import Learner


def warm_up(
    learner: Learner,
    sampler: Sampler,
    params: SamplingParams,
    *,
    prompt_lengths: Sequence[int],
    n: int,
    groups_per_step: int,
    groups_per_rollout: int,
    keeps_old: bool,
    seed: int,
) -> str:
    """Run the largest decode batch and the largest micro-batch once; returns what to tell the user.

    prompt_lengths: of the prompts that the run may draw. groups_per_step, groups_per_rollout: of
    this process. keeps_old: old log-probs are compared with. A sampler that cannot be warmed up is
    left out. Raises MemoryExhaustedError.
    """
    started = time.perf_counter()
    on_gpu = learner.policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    oom_retry = learner.execution.oom_retry
    before = oom_retry.tokens, oom_retry.in_flight
    lengths = sorted(prompt_lengths, reverse=True)
    parts = ["an update"]
    with seeded(derive(seed, "rehearsal")):
        if sampler.warm_up(_prompts(learner, lengths, groups_per_rollout), n, params):
            parts.insert(0, "a rollout")
        step = _prompts(learner, lengths, groups_per_step)
        _warm_up_update(learner, step, n, params.max_new_tokens, keeps_old)
    release()
    said = f"Rehearsed {' and '.join(parts)} at the greatest lengths"
    if on_gpu:
        said += f": {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at the peak"
    oom_retry.take_retries()
    if (oom_retry.tokens, oom_retry.in_flight) != before:
        said += f"; memory ran out: micro-batches have {oom_retry.tokens} tokens from now on"
        if oom_retry.in_flight is not None:
            said += f" and {oom_retry.in_flight} completions are decoded together"
    return f"{said} ({time.perf_counter() - started:.1f} s)."


def _prompts(learner: Learner, lengths: Sequence[int], count: int) -> list[list[int]]:
    """``count`` prompts of random tokens, as long as the longest of the data; two tokens at least,
    so that there is a prefill."""
    vocabulary = learner.policy.vocabulary_size
    chosen = [max(lengths[i % len(lengths)], 2) for i in range(count)]
    return [torch.randint(vocabulary, (length,)).tolist() for length in chosen]


def _warm_up_update(
    learner: Learner, prompts: Sequence[Sequence[int]], n: int, length: int, keeps_old: bool
) -> None:
    vocabulary = learner.policy.vocabulary_size
    oom_retry, layout, whole = (
        learner.execution.oom_retry,
        learner.policy.layout,
        learner.policy.whole,
    )
    samples: list[TrainingSample] = []
    for prompt in prompts:
        samples += [
            TrainingSample(
                prompt_ids=tuple(prompt),
                completion_ids=tuple(torch.randint(vocabulary, (length,)).tolist()),
                advantage=1.0 if i % 2 else -1.0,
                old_logp=torch.zeros(length) if keeps_old else None,
                ref_logp=torch.zeros(length) if learner.options.beta else None,
            )
            for i in range(n)
        ]
        forwarded = forwarded_tokens([s.pair for s in samples], layout, whole=whole)
        if forwarded >= oom_retry.tokens:
            break
    pairs = [sample.pair for sample in samples]

    def work() -> None:
        # Any micro-batch but the first finds the gradients of those before it.
        for _, parameter in learner.policy.trainable():
            parameter.grad = torch.zeros_like(parameter)
        largest = micro_batches(pairs, oom_retry.tokens, layout, whole=whole)[0]
        learner.backward([samples[i] for i in largest], n * length, n, step=0)

    try:
        oom_retry.update(work, lambda: longest(pairs, whole=whole), "the rehearsal of an update")
    finally:
        learner.optimizer.zero_grad(set_to_none=True)
