"""A run that runs out of memory goes on as if it had not."""

from __future__ import annotations

import contextlib
import dataclasses
import logging

import process_runs
import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedgrpo.engine.memory.oom_retry import OOMRetry, is_out_of_memory
from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.engine.rollout.generate_sampler import GenerateSampler
from fusedgrpo.errors import MemoryExhaustedError
from fusedgrpo.models.ragged_decode import RaggedDecoder

CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class FailingAllocator(TorchDispatchMode):
    """Counts operations that make new storage, and fails those that ``fails`` names."""

    def __init__(self, fails):
        super().__init__()
        self.fails = fails
        self.requests = 0
        self.failed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tensors((args, kwargs))}
        if any(storage(x) not in given for x in tensors(out)):
            self.requests += 1
            if self.fails(self.requests):
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out


def storage(tensor):
    return tensor.untyped_storage()._cdata


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


# What runs on the device, by where it starts; everything else of a step is bookkeeping on the CPU.
def with_allocator(trainer, allocator, phases=("sample", "score", "update", "norm")):
    """Let the device's allocations of these phases go through ``allocator``."""

    def guarded(owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            with allocator:
                return original(*args, **kwargs)

        setattr(owner, name, call)

    if "sample" in phases:
        if isinstance(trainer.sampler, GenerateSampler):
            guarded(trainer.sampler, "_decode")
        else:
            guarded_advances(trainer.sampler, allocator)
    if "score" in phases:
        plain = trainer.policy.logprobs

        def scored(*args, **kwargs):
            inside = not torch.is_grad_enabled()
            with allocator if inside else contextlib.nullcontext():
                return plain(*args, **kwargs)

        trainer.policy.logprobs = scored
    if "update" in phases:
        guarded(trainer.learner, "backward")
    if "norm" in phases:
        guarded(trainer.learner, "_norm")
    return trainer


def guarded_advances(sampler, allocator):
    """Let what our decoder does on the device go through ``allocator``: its forward passes and the
    choice of tokens."""
    how = sampler.how

    @contextlib.contextmanager
    def weights():
        with how.weights(), allocator:
            yield

    sampler.how = dataclasses.replace(how, weights=weights)


def small_run(path, **changes):
    options = {
        "model": tiny.model("Llama", num_hidden_layers=1),
        "num_generations": 2,
        "prompts_per_step": 2,
        "max_completion_length": 3,
        "max_steps": 2,
        "generation_batch_size": 8,
        "beta": 0.1,
        "tokens_per_microbatch": 12,
        "gradient_checkpointing": True,
        "lora_target_modules": ["q_proj"],
        "drift_check": False,  # what is scored after the last step is in the row of no step
    }
    return process_runs.make(path, **options | changes)


def outcome(trainer):
    trainer.train()
    rows = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    kept = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]
    retries = sum(row.get("memory/retries", 0) for row in rows)
    weights = torch.cat([p.detach().flatten() for _, p in trainer.policy.trainable()])
    return kept, weights, retries


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "sampler"),
    [
        ("sample", "generate"),
        ("sample", "decoder"),
        ("score", "auto"),
        ("update", "auto"),
        ("norm", "auto"),
    ],
)
def test_whichever_allocation_fails_the_run_is_the_same(tmp_path, phase, sampler):
    counted = FailingAllocator(lambda k: False)
    undisturbed = small_run(tmp_path / "whole", sampler=sampler)
    undisturbed = with_allocator(undisturbed, counted, [phase])
    rows, weights, retries = outcome(undisturbed)
    assert retries == 0 and counted.requests > 2
    places = 4  # the first, the last, and between them
    for nth in range(places):
        k = 1 + (counted.requests - 1) * nth // (places - 1)
        allocator = FailingAllocator(lambda request, k=k: request == k)
        run = small_run(tmp_path / str(k), sampler=sampler)
        run = with_allocator(run, allocator, [phase])
        other_rows, other_weights, retries = outcome(run)
        assert (allocator.failed, retries) == (1, 1)
        if (phase, sampler) == ("sample", "decoder"):
            # What had ended stays, so the others are in other company, which may round otherwise.
            for got, want in zip(other_rows, rows, strict=True):
                assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
            torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-6)
        else:
            assert other_rows == rows, f"allocation {k} of {counted.requests}"
            assert torch.equal(other_weights, weights)
        assert run.execution.oom_retry.tokens == 12 and run.execution.oom_retry.in_flight is None


@pytest.mark.parametrize("sampler", ["generate", "decoder"])
def test_what_fails_twice_is_halved_and_gives_the_same_run(tmp_path, caplog, monkeypatch, sampler):
    options = {"tokens_per_microbatch": 40, "max_completion_length": 6, "sampler": sampler}
    rows, weights, _ = outcome(small_run(tmp_path / "whole", **options))

    def too_large(run):
        """More than 20 tokens, or 3 completions at once, do not fit."""
        logprobs = run.policy.logprobs

        def limited(packed, **kwargs):
            if len(packed.input_ids.flatten()) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return logprobs(packed, **kwargs)

        run.policy.logprobs = limited
        if sampler == "decoder":
            advance = RaggedDecoder.advance

            def limited_advance(decoder, step, *more):
                if len(step) > 3:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return advance(decoder, step, *more)

            monkeypatch.setattr(RaggedDecoder, "advance", limited_advance)
            return run
        decode = run.sampler._decode

        def limited_decode(prompts, prompt_of, *args):
            if len(prompt_of) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return decode(prompts, prompt_of, *args)

        run.sampler._decode = limited_decode
        return run

    run = too_large(small_run(tmp_path / "tight", **options))
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        other_rows, other_weights, retries = outcome(run)
    assert retries >= 4
    assert run.execution.oom_retry.tokens <= 20 and run.execution.oom_retry.in_flight <= 3
    assert "completions in flight 8 -> 4 for the rest of this run" in caplog.text
    assert "tokens_per_microbatch 40 -> 20 for the rest of this run" in caplog.text
    names = {"num_forwarded_tokens"}  # of prompts that are cut
    for got, want in zip(other_rows, rows, strict=True):
        assert {k: v for k, v in got.items() if k not in names} == pytest.approx(
            {k: v for k, v in want.items() if k not in names}, rel=1e-5, abs=1e-6
        )
    torch.testing.assert_close(other_weights, weights, rtol=1e-5, atol=1e-6)


def test_below_the_floor_the_run_ends_with_its_state_saved(tmp_path):
    run = small_run(tmp_path / "run", generation_batch_size=4)
    backward = run.learner.backward

    def second_step_fails(samples, items, sequences, step, *more):
        if step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return backward(samples, items, sequences, step, *more)

    run.learner.backward = second_step_fails
    with pytest.raises(MemoryExhaustedError, match=r"the update.*Tried to allocate 2.00 GiB"):
        run.train()
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_other_errors_pass():
    oom_retry = OOMRetry(8)

    def work():
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        oom_retry.update(work, lambda: 1, "test")
    assert oom_retry.retries == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), False),
        (RuntimeError("The size of tensor a (3) must match"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_halving_stops_at_the_longest_sequence_and_at_one_completion():
    oom_retry = OOMRetry(100, 5)

    def never():
        raise FULL

    with pytest.raises(MemoryExhaustedError):
        oom_retry.update(never, lambda: 30, "test")
    assert oom_retry.tokens == 30 and oom_retry.take_retries() == 4
    with pytest.raises(MemoryExhaustedError):
        oom_retry.sample(never, 64)
    assert oom_retry.in_flight == 1
