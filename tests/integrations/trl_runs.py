"""Trainers on tiny models, and whole seeded runs of stock TRL and of ours whose logs are equal."""

from __future__ import annotations

import functools
import itertools
import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

TOLERANCE = 1e-5  # relative and absolute, of every number in every log row
PROMPTS = ["w4 w5 w6", "w7 w8", "w9 w10 w11 w12", "w5", "w6 w6 w7", "w30 w31"]
# Arguments of the trainers; everything else goes into their configuration.
OF_THE_TRAINER = (
    "model", "reward_funcs", "peft_config", "eval_dataset", "group_rows", "shared_prompt",
    "fused_loss", "fused_rollouts", "rollout_weights", "tools", "rollout_func",
    "environment_factory", "processing_class",
)  # fmt: skip


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def sometimes(completion_ids, **kwargs):
    """Does not apply to every third completion."""
    return [None if ids[0] % 3 == 0 else float(len(ids)) for ids in completion_ids]


def rollout(prompts, trainer):
    """Completions drawn without the model; of each, the third and fourth token are not its own."""
    g = torch.Generator().manual_seed(trainer.state.global_step)
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    sizes = torch.randint(3, 9, (len(prompts),), generator=g).tolist()
    completions = [torch.randint(4, tiny.VOCAB, (n,), generator=g).tolist() for n in sizes]
    return {
        "prompt_ids": ids,
        "completion_ids": completions,
        "logprobs": None,
        "env_mask": [[int(t not in (2, 3)) for t in range(n)] for n in sizes],
    }


def mixture_of_experts():
    """A tiny model whose router has a loss, with the coefficient that its family declares."""
    return tiny.mixture("Mixtral")


# Options of whole runs, by name.
RUNS = {
    "defaults": {},
    "KL, a reference model, grpo, batch scale": {
        "beta": 0.1, "loss_type": "grpo", "scale_rewards": "batch",
    },
    "a reference model that follows, luspo": {
        "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "loss_type": "luspo",
        "ref_model_mixup_alpha": 0.5, "importance_sampling_level": "sequence",
        "use_bias_correction_kl": False,
    },
    "two iterations, four steps per generation, dr_grpo": {
        "steps_per_generation": 4, "num_iterations": 2, "loss_type": "dr_grpo", "max_steps": 5,
        "epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.2,
    },
    "a short last window": {
        "gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": -1,
        "num_train_epochs": 2,
    },
    "sequence level, no accumulation, cispo": {
        "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8,
        "generation_batch_size": 16, "importance_sampling_level": "sequence",
        "loss_type": "cispo", "epsilon_high": 2.0,
    },
    "truncated completions masked, bnpo": {
        "mask_truncated_completions": True, "loss_type": "bnpo", "scale_rewards": "none",
    },
    "temperature, padding to a multiple, sapo": {
        "temperature": 0.7, "top_k": 20, "pad_to_multiple_of": 8, "loss_type": "sapo",
        "sapo_temperature_neg": 1.3, "sapo_temperature_pos": 0.9, "num_generations": 2,
    },
    "no checkpointing, float32 head, vespo": {
        "gradient_checkpointing": False, "cast_lm_head_to_fp32": True, "loss_type": "vespo",
        "steps_per_generation": 4, "vespo_k_pos": 1.5, "vespo_lambda_neg": 1.5,
        "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.0,
    },
    "entropy bonus, entropy quantile, off-policy mask": {
        "entropy_coef": 0.02, "top_entropy_quantile": 0.63, "off_policy_mask_threshold": 0.01,
        "steps_per_generation": 4, "max_steps": 4,
    },
    "adaptive entropy bonus": {
        "entropy_coef": 0.02, "use_adaptive_entropy": True, "entropy_target": 3.0,
        "entropy_coef_delta": 0.01, "entropy_coef_min": 0.01, "entropy_coef_max": 0.04,
        "max_steps": 4,
    },
    "two reward functions with None, normalized one by one": {
        "reward_funcs": [even_ids, sometimes], "reward_weights": [1.0, 0.5],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "completions of a rollout_func, parts not the model's": {
        "rollout_func": rollout, "gradient_accumulation_steps": 1, "steps_per_generation": 2,
    },
    "mixture of experts": {"model": mixture_of_experts, "gradient_accumulation_steps": 1},
    "mixture of experts, KL, a larger router's loss": {
        "model": mixture_of_experts, "router_aux_loss_coef": 0.1, "beta": 0.1,
        "num_iterations": 2, "max_completion_length": 12,
    },
    "mixture of experts without its router's loss": {
        "model": mixture_of_experts, "router_aux_loss_coef": 0.0,
    },
}  # fmt: skip

# Those that fused_loss=True refuses.
ONLY_TRLS_LOSS = ("adaptive entropy bonus",)

# With adapters, KL, two rewards, evaluation, a log of completions, and checkpoints.
LORA_RUN = {
    "beta": 0.1, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
    "peft_config": LoraConfig(target_modules="all-linear", r=2),
    "reward_funcs": [even_ids, sometimes], "reward_weights": [1.0, 0.1],
    "eval_dataset": Dataset.from_dict({"prompt": PROMPTS[:2]}), "eval_strategy": "steps",
    "eval_steps": 2, "per_device_eval_batch_size": 4, "log_completions": True,
    "num_completions_to_print": 2,
}  # fmt: skip

# By name, as RUNS. RLOO has a loss of its own, for which there is no fused_loss.
RLOO_RUNS = {
    "RLOO": {"beta": 0.0},
    "RLOO, KL, two iterations": {
        "beta": 0.1, "num_iterations": 2, "normalize_advantages": True, "epsilon_high": 0.3,
        "reward_clip_range": (-1.0, 1.0),
    },
}  # fmt: skip


def make(cls, path, *, config=GRPOConfig, **options):
    """A trainer on a tiny model, the same whatever ran before it."""
    own = {name: options.pop(name) for name in OF_THE_TRAINER if name in options}
    defaults = {
        "output_dir": str(path), "use_cpu": True, "bf16": False, "report_to": "none",
        "logging_steps": 1, "per_device_train_batch_size": 4, "num_generations": 4,
        "gradient_accumulation_steps": 2, "max_completion_length": 8, "max_steps": 3,
        "learning_rate": 1e-2, "disable_dropout": True, "save_strategy": "no",
        # 1e-8, the default, makes full steps of the rounding of gradients near 0.
        "adam_epsilon": 1e-3,
    }  # fmt: skip
    own = {
        "model": tiny.model("Llama", scale=6.0),
        "reward_funcs": even_ids,
        "processing_class": tiny.tokenizer(),
    } | own
    return cls(
        args=config(**(defaults | options)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        **own,
    )


def trained(cls, path, *, resume_from_checkpoint=None, **options):
    """``model`` is a function that makes it, as ``RUNS`` have it."""
    model = options.pop("model", functools.partial(tiny.model, "Llama", scale=6.0))()
    model.save_pretrained(path / "model")  # TRL loads its reference from there
    model.config._name_or_path = str(path / "model")
    trainer = make(cls, path, model=model, **options)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


def logs(trainer):
    """Log rows without what depends on the clock."""
    skip = ("runtime", "per_second", "step_time")
    return [
        {k: v for k, v in row.items() if not any(s in k for s in skip)}
        for row in trainer.state.log_history
    ]


def assert_same_runs(stock, ours, rows=slice(None)):
    for want, got in itertools.zip_longest(logs(stock)[rows], logs(ours)[rows]):
        assert got == pytest.approx(want, rel=TOLERANCE, abs=TOLERANCE)
    weights = dict(ours.model.named_parameters())
    for name, want in stock.model.named_parameters():
        torch.testing.assert_close(weights.pop(name), want, rtol=TOLERANCE, atol=TOLERANCE)
    assert not weights
