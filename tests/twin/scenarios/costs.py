"""What one more token, micro-batch and layer ask of the device; see test_costs.py."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cuda_twin.counts import marginal
from cuda_twin.process import leave
from runs import make, model_files, on_the_twin, twin

from fusedgrpo import GRPOTrainer
from fusedgrpo.engine.rollout.sampler import SamplingParams
from fusedgrpo.engine.rollout.training_sample import TrainingSample

PROMPTS = [(5, 6, 7), (8, 9, 4), (11, 12, 13), (20, 21, 22)]
UPDATES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora with all that a loss can have": {
        "beta": 0.1,
        "sampler_correction": True,
        "num_iterations": 2,
        "entropy_coef": 0.01,
    },
    "lora with checkpointing and offload": {
        "gradient_checkpointing": True,
        "activation_offloading": True,
    },
    "qlora": {"load_in_4bit": True},
    "full": {"finetuning_type": "full"},
    "float16": {"bf16": False, "fp16": True},
}


@contextlib.contextmanager
def trainer(layers: int, **changes: Any) -> Iterator[GRPOTrainer]:
    with tempfile.TemporaryDirectory() as directory:
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


def micro_batch(layers: int, **changes: Any) -> Any:
    """The cost of one more micro-batch in an update."""
    with trainer(layers, **changes) as made:
        found = []
        for count in (2, 2, 4):  # what is made once is made in the first
            some = samples(made, count)
            with twin.counted() as counts:
                parts = made.learner.backward(some, 3 * count, count, step=0)
            made.learner.optimizer.zero_grad(set_to_none=True)
            assert len(parts) == count
            found.append(counts)
    return marginal(found[2], found[1], 2)


def scored_micro_batch() -> Any:
    """The cost of one more micro-batch whose log-probs are only asked for."""
    with trainer(1) as made:
        found = []
        for count in (2, 2, 4):
            with twin.counted() as counts:
                made.learner.passes.entropies(samples(made, count))
            found.append(counts)
    return marginal(found[2], found[1], 2)


def token(layers: int, **changes: Any) -> Any:
    """The cost of one more token of four sequences that are decoded together."""
    with trainer(layers, **changes) as made:
        made.sampler.eos_ids = frozenset()
        found = []
        for tokens in (3, 3, 7):
            params = SamplingParams(max_new_tokens=tokens)
            with twin.counted() as counts:
                groups = made.sampler.sample(PROMPTS[:2], 2, params, seed=4)
            assert {len(c.ids) for group in groups for c in group.completions} == {tokens}
            found.append(counts)
    return marginal(found[2], found[1], 4)


SCENARIOS = {
    **{f"update, {name}": lambda name=name: micro_batch(1, **UPDATES[name]) for name in UPDATES},
    "update, lora, two layers": lambda: micro_batch(2),
    "update, qlora, two layers": lambda: micro_batch(2, load_in_4bit=True),
    "scoring": scored_micro_batch,
    **{
        f"token, {weights}, {layers}": lambda weights=weights, layers=layers: token(
            layers, rollout_weights=weights
        )
        for weights in ("adapter", "merged")
        for layers in (1, 2)
    },
}

with on_the_twin():
    leave(SCENARIOS)
