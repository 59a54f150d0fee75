"""The greatest lengths are tried before step 1, and leave no trace but a smaller budget."""

from __future__ import annotations

import logging

import process_runs
import pytest
import torch

from fusedgrpo.engine.reporting.metrics_log import read_metrics
from fusedgrpo.errors import MemoryExhaustedError
from fusedgrpo.models.ragged_decode import RaggedDecoder

CLOCK = ("time/", "step_time", "tokens_per_second", "memory/")
OPTIONS = {"prompts_per_step": 2, "max_completion_length": 6, "generation_batch_size": 16}


def rows(trainer):
    trainer.train()
    found = read_metrics(f"{trainer.args.output_dir}/metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in found]


def recorded(trainer):
    """The trainer, which samples with generate, and where it notes the sizes of forwards with
    gradients and of decodings."""
    tokens, cached = [], []
    logprobs, decode = trainer.policy.logprobs, trainer.sampler._decode

    def noting(packed, **kwargs):
        tokens.append(packed.input_ids.numel())
        return logprobs(packed, **kwargs)

    def noting_decode(prompts, prompt_of, params, seeds, skipped=0, *options):
        longest = max(map(len, prompts))
        cached.append((len(prompt_of), longest + skipped + params.max_new_tokens))
        return decode(prompts, prompt_of, params, seeds, skipped, *options)

    trainer.policy.logprobs, trainer.sampler._decode = noting, noting_decode
    return trainer, tokens, cached


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3"])
def test_a_rehearsed_run_is_the_same_run(tmp_path, family, capsys):
    import tiny

    def make(name, **changes):
        model = tiny.model(family)
        return process_runs.make(tmp_path / name, model=model, **OPTIONS, beta=0.1, **changes)

    plain, with_rehearsal = make("plain"), make("rehearsed", rehearsal=True)
    assert rows(with_rehearsal) == rows(plain)
    for (_, a), (_, b) in zip(
        plain.policy.trainable(), with_rehearsal.policy.trainable(), strict=True
    ):
        assert torch.equal(a, b)
    assert "Rehearsed a rollout and an update at the greatest lengths" in capsys.readouterr().out


def test_nothing_that_follows_is_larger(tmp_path):
    run, tokens, cached = recorded(
        process_runs.make(tmp_path / "run", sampler="generate", **OPTIONS)
    )
    run.warm_up()
    rehearsed, cache = max(tokens), max(cached)
    tokens.clear()
    cached.clear()
    run.train()
    assert max(tokens) <= rehearsed
    longest = max(len(example.prompt_ids) for example in run.data.examples)
    assert cache == (16, longest + 6)
    assert max(cached) <= cache


def test_no_step_of_the_decoder_is_larger(tmp_path, monkeypatch):
    run = process_runs.make(tmp_path / "run", **OPTIONS)
    plain, sizes = RaggedDecoder.next, []

    def noting(self, rows, *more):
        sizes.append((len(rows), max(row.said for row in rows), self.cache.pages))
        return plain(self, rows, *more)

    monkeypatch.setattr(RaggedDecoder, "next", noting)
    run.warm_up()
    (rehearsed,) = sizes
    sizes.clear()
    run.train()
    assert sizes and all(a <= b for size in sizes for a, b in zip(size, rehearsed, strict=True))


def test_it_holds_the_gradients_that_every_micro_batch_but_the_first_finds(tmp_path):
    run = process_runs.make(tmp_path / "run", **OPTIONS)
    backward, found = run.learner.backward, []

    def noting(*args, **kwargs):
        found.append(all(p.grad is not None for _, p in run.policy.trainable()))
        return backward(*args, **kwargs)

    run.learner.backward = noting
    run.warm_up()
    assert found == [True]
    assert all(p.grad is None for _, p in run.policy.trainable())


def test_what_does_not_fit_is_halved_before_step_1(tmp_path, caplog):
    run = process_runs.make(
        tmp_path / "run", rehearsal=True, tokens_per_microbatch=80, num_iterations=2, **OPTIONS
    )
    logprobs = run.policy.logprobs

    def limited(packed, **kwargs):
        if packed.input_ids.numel() > 22:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")
        return logprobs(packed, **kwargs)

    run.policy.logprobs = limited
    with caplog.at_level(logging.WARNING, "fusedgrpo"):
        found = rows(run)
    assert run.execution.oom_retry.tokens == 20
    assert all("memory/retries" not in row for row in found)  # all of it was before step 1
    assert "the rehearsal of an update; tokens_per_microbatch 40 -> 20" in caplog.text


def test_what_can_never_fit_fails_before_step_1(tmp_path):
    run = process_runs.make(tmp_path / "run", rehearsal=True, **OPTIONS)

    def never(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    run.policy.logprobs = never
    with pytest.raises(MemoryExhaustedError, match=r"rehearsal.*Tried to allocate 3 GiB.*plan"):
        run.train()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert all(p.grad is None for _, p in run.policy.trainable())
