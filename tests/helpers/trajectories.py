"""Tiny runs that a change which is not meant to change results leaves as they are, bit for bit.

    PYTHONPATH=$PWD python tests/helpers/trajectories.py            a fingerprint of each run
    PYTHONPATH=$PWD python tests/helpers/trajectories.py --write    tests/trajectories.json anew

Fingerprints are equal before and after, on one machine and with one version of torch. What other
machines are compared with is ``tests/trajectories.json``: numbers, equal up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import hybrids
import tiny
import torch

from fusedgrpo import GRPOConfig, GRPOTrainer
from fusedgrpo.engine.reporting.metrics_log import read_metrics

GOLDEN = Path(__file__).parents[1] / "trajectories.json"
CLOCK = ("time/", "step_time", "tokens_per_second", "memory/", "roofline/")
PROMPTS = [
    {"prompt": " ".join(f"w{4 + (i * j) % 30}" for j in range(1, 3 + i % 4))} for i in range(7)
]


def even(completion_ids: Any, **kwargs: Any) -> list[float]:
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def short(completion_ids: Any, **kwargs: Any) -> list[float | None]:
    """Does not apply to completions of one token."""
    return [1 / len(ids) if len(ids) > 1 else None for ids in completion_ids]


# Options, beside OPTIONS. model: of tiny, hybrids or a mixture; rewards: those of the run.
CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "generate": {"sampler": "generate"},
    "merged-decoder": {"sampler": "decoder", "rollout_weights": "merged"},
    "adapter-decoder": {"sampler": "decoder", "rollout_weights": "adapter", "max_in_flight": 3},
    "grpo-kl-two-passes": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
    "vespo-sequence-correction": {
        "loss_type": "vespo",
        "importance_sampling_level": "sequence",
        "sampler_correction": True,
    },
    "sapo-entropy-window": {
        "loss_type": "sapo",
        "entropy_coef": 0.01,
        "generation_batch_size": 16,
    },
    "cispo-two-rewards": {
        "loss_type": "cispo",
        "rewards": [even, short],
        "reward_weights": [1.0, 0.5],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "bnpo-delta-batch-scale": {
        "loss_type": "bnpo",
        "delta": 1.5,
        "num_iterations": 2,
        "scale_rewards": "batch",
    },
    "full-offload": {
        "finetuning_type": "full",
        "gradient_checkpointing": True,
        "activation_offloading": True,
    },
    "packed-small-microbatches": {"shared_prompt": "off", "tokens_per_microbatch": 24},
    "filters-and-truncation": {
        "top_k": 5,
        "top_p": 0.9,
        "mask_truncated_completions": True,
        "max_in_flight": 4,
    },
    "evaluation-and-warmup": {"eval_strategy": "steps", "eval_steps": 2, "warmup_steps": 2},
    "mixture-of-experts": {"model": "Mixtral", "router_aux_loss_coef": 0.02},
    "states": {"model": "LFM2"},
}
OPTIONS: dict[str, Any] = {
    "num_generations": 4,
    "prompts_per_step": 2,
    "max_completion_length": 6,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "lora_r": 4,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
}


class Trajectory(NamedTuple):
    """rows: of metrics.jsonl, without clocks. weights: the sum and the norm of what was trained."""

    rows: list[dict[str, Any]]
    weights: list[float]
    fingerprint: str


def run(name: str) -> Trajectory:
    changes = dict(CASES[name])
    kind, rewards = changes.pop("model", "Qwen2"), changes.pop("rewards", even)
    if kind in tiny.MIXTURES:
        model = tiny.mixture(kind)
    else:
        model = tiny.model(kind) if kind in tiny.FAMILIES else hybrids.model(kind)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rewards,
            args=GRPOConfig(**OPTIONS | {"output_dir": f"{folder}/run"} | changes),
            train_dataset=PROMPTS,
            eval_dataset=PROMPTS[:3] if "eval_strategy" in changes else None,
            tokenizer=tiny.tokenizer(),
        )
        trainer.train()
        rows = read_metrics(f"{folder}/run/metrics.jsonl")
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]
    trained = [p.detach().contiguous() for _, p in trainer.policy.trainable()]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode())
    for tensor in trained:
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    flat = torch.cat([tensor.flatten().double() for tensor in trained])
    return Trajectory(rows, [flat.sum().item(), flat.norm().item()], digest.hexdigest()[:16])


def main() -> None:
    torch.set_num_threads(1)
    golden = {}
    for name in CASES:
        found = run(name)
        print(found.fingerprint, name, flush=True)
        golden[name] = {"rows": found.rows, "weights": found.weights}
    if "--write" in sys.argv:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
