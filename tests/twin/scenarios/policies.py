"""Policies on the CUDA twin: their numbers, and what one more token, micro-batch and layer ask of
the device; see test_policies.py."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import interpreted_liger
import tiny
import torch
from cuda_twin.counts import marginal
from cuda_twin.process import leave
from runs import make, model_files, on_the_twin, twin

from fusedgrpo import GRPOTrainer
from fusedgrpo.engine.rollout.decoder_sampler import DecoderSampler
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.training_sample import TrainingSample
from fusedgrpo.models import activation_offload
from fusedgrpo.models.policy import Policy

PROMPTS = [(5, 6, 7), (8, 9, 4), (11, 12, 13), (20, 21, 22)]
FAMILIES = ("Qwen2", "Llama", "Gemma2", "Mistral", "Qwen3")
PAIRS = [((5, 6, 7), (8, 9, 4)), ((5, 6, 7), (11, 12)), ((4, 9, 9, 3, 17, 30, 2), (9, 30, 1))]


def family(name: str) -> Any:
    """Forward and backward in bfloat16, beside float32 on the CPU; sampled log-probs beside the
    policy's."""
    torch.manual_seed(0)
    built = tiny.model(name, scale=3.0, hidden_size=64, head_dim=32)
    exact = Policy(copy.deepcopy(built))
    expected = exact.logprobs(exact.pack(PAIRS)).logp
    expected.sum().backward()
    there = Policy(built.cuda(), compute_dtype=torch.bfloat16)
    found = there.logprobs(there.pack(PAIRS)).logp
    found.sum().backward()
    grads = [
        torch.cat([p.grad.cpu().flatten() for p in of.model.parameters()]) for of in (there, exact)
    ]
    with on_the_twin():
        sampler = DecoderSampler(there, tiny.tokenizer(), [tiny.EOS])
        groups = sampler.sample([PAIRS[2][0]], 2, SamplingParams(max_new_tokens=4), seed=1)
    said = [(group.prompt_ids, c) for group in groups for c in group.completions]
    with there.scoring():
        trained = there.logprobs(there.pack([(ids, c.ids) for ids, c in said])).logp.cpu()
    return {
        "layout": there.layout,
        "logp": float((found.cpu() - expected).detach().abs().max()),
        "grad": float((grads[0] - grads[1]).norm() / grads[1].norm()),
        "sampled": float((torch.cat([c.logp for _, c in said]) - trained).abs().max()),
    }


@contextlib.contextmanager
def trainer(layers: int, **changes: Any) -> Iterator[GRPOTrainer]:
    with tempfile.TemporaryDirectory() as directory, on_the_twin():
        model = model_files(Path(directory, "model"), layers)
        made = make(Path(directory, "run"), model, tokens_per_microbatch=6, **changes)
        twin.watch(made.policy.model)
        yield made


def samples(made: GRPOTrainer, count: int) -> list[TrainingSample]:
    """One for each prompt, and so for each micro-batch."""

    def values(offset: float) -> torch.Tensor:
        return torch.linspace(-3.0, -2.0, 3) + offset

    kept = made.args.num_iterations > 1
    return [
        TrainingSample(
            prompt_ids=prompt,
            completion_ids=(30, 31, 32 + i),
            advantage=(-1.0) ** i,
            old_logp=values(0.1) if kept else None,
            ref_logp=values(0.2) if made.args.beta else None,
            sampler_logp=values(0.0),
            sampler_weight=values(4.0) if made.args.sampler_correction else None,
        )
        for i, prompt in enumerate(PROMPTS[:count])
    ]


def micro_batch(made: GRPOTrainer) -> Any:
    """The cost of one more micro-batch in an update."""
    found = []
    for count in (2, 2, 4):  # what is made once is made in the first
        some = samples(made, count)
        with twin.counted() as counts:
            parts = made.learner.backward(some, 3 * count, count, step=0)
        made.learner.optimizer.zero_grad(set_to_none=True)
        assert len(parts) == count
        found.append(counts)
    return marginal(found[2], found[1], 2)


def scored_micro_batch(made: GRPOTrainer) -> Any:
    """The cost of one more micro-batch whose numbers are only asked for."""
    found = []
    for count in (2, 4):
        with twin.counted() as counts:
            made.learner.passes.entropies(samples(made, count))
        found.append(counts)
    return marginal(found[1], found[0], 2)


def token(sampler: Any) -> Any:
    """The cost of one more token of two sequences that are decoded together."""
    sampler.eos_ids = frozenset()
    found = []
    for tokens in (2, 4):
        params = SamplingParams(max_new_tokens=tokens)
        with twin.counted() as counts:
            groups = sampler.sample(PROMPTS[:1], 2, params, seed=4)
        assert {len(c.ids) for group in groups for c in group.completions} == {tokens}
        found.append(counts)
    return marginal(found[1], found[0], 2)


def lora(layers: int, **changes: Any) -> Any:
    """What the usual run costs, in all its parts."""
    with trainer(layers, **changes) as made:
        merged = DecoderSampler(made.policy, made.tokenizer, [], rollout_weights="merged")
        return {
            "update": micro_batch(made),
            "scoring": scored_micro_batch(made),
            "token, adapter": token(made.sampler),
            "token, merged": token(merged),
        }


def ligers(layers: int) -> Any:
    """The same with Liger's layers; None where there is no Liger."""
    if not importlib.util.find_spec("liger_kernel"):
        return None
    interpreted_liger.install()
    return lora(layers, use_liger_kernel=True)


def update(**changes: Any) -> Any:
    with trainer(1, sampler="generate", **changes) as made:
        return {"update": micro_batch(made)}


def memory_saved() -> Any:
    """Activations are computed again, and those that are kept are moved however small they are."""
    saving = {"gradient_checkpointing": True, "activation_offloading": True}
    with (
        mock.patch.object(activation_offload, "CHUNK", 1 << 16),
        trainer(1, sampler="generate", **saving) as made,
    ):
        made.learner.offload.min_bytes = 1
        return {"update": micro_batch(made)}


def all_of_a_loss() -> Any:
    return update(beta=0.1, sampler_correction=True, num_iterations=2, entropy_coef=0.01)


SCENARIOS = {
    **{name: lambda name=name: family(name) for name in FAMILIES},
    "lora, 1 layer": lambda: lora(1),
    "lora, 2 layers": lambda: lora(2),
    "all of a loss": all_of_a_loss,
    "memory saved": memory_saved,
    "qlora": lambda: update(load_in_4bit=True),
    "full": lambda: update(finetuning_type="full"),
    "float16": lambda: update(bf16=False, fp16=True),
    # At the end: they change the interpreter.
    "liger, 1 layer": lambda: ligers(1),
    "liger, 2 layers": lambda: ligers(2),
}

if __name__ == "__main__":
    leave(SCENARIOS)
