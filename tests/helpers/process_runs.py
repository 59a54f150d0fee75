"""Runs of test_distributed.py: in one process there, in two when a launcher starts this file."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import caller
import tiny
import torch
from transformers import TrainerCallback

from fusedgrpo import GRPOConfig, GRPOTrainer, host

PROMPTS = [
    {"prompt": " ".join(f"w{4 + (i * j) % 30}" for j in range(1, 3 + i % 4))} for i in range(7)
]


def even_ids(completion_ids, **kwargs):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def sometimes(completion_ids, log_extra, log_metric, **kwargs):
    """Does not apply to every third completion, and logs something."""
    log_extra("first", [ids[0] for ids in completion_ids])
    return [None if ids[0] % 3 == 0 else float(len(ids)) for ids in completion_ids]


def first_prompt_only(prompts, completion_ids, **kwargs):
    """No signal in most groups, and so nothing to do for one of two processes."""
    first = PROMPTS[0]["prompt"]
    return [
        float(ids[0] % 5) if prompt == first else 1.0
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


RUNS = {
    "one step per rollout": {"prompts_per_step": 3, "max_grad_norm": 0.1},
    "a window with kl": {
        "prompts_per_step": 3,
        "generation_batch_size": 20,
        "num_iterations": 2,
        "beta": 0.1,
        "num_generations": 4,
        "reward_funcs": [even_ids, sometimes],
        "scale_rewards": "batch",
        "tokens_per_microbatch": 24,
        "max_steps": 5,
    },
    "fewer prompts than processes": {
        "prompts_per_step": 1,
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "entropy_coef": 0.01,
        "num_iterations": 2,
    },
    "one process without signal": {
        "prompts_per_step": 7,
        "reward_funcs": [first_prompt_only],
    },
    "other prompts for those without signal": {
        "prompts_per_step": 2,
        "num_generations": 2,
        "reward_funcs": [first_prompt_only, even_ids],
        "dynamic_sampling": True,
        "max_steps": 2,
    },
    "environments": {
        "acts": True,
        "reward_funcs": None,
        "prompts_per_step": 3,
        "num_generations": 2,
        "max_completion_length": 60,
        "max_tool_calling_iterations": 3,
        "lora_target_modules": "all-linear",
        "max_steps": 2,
    },
    # The decoder's rows are others in two processes, and in 16 bits a token turns at a tie.
    "in bfloat16": {
        "sampler": "generate",
        "prompts_per_step": 3,
        "beta": 0.1,
        "bf16": None,
        "max_steps": 1,
        "adam_epsilon": 1.0,  # weights move as their gradients are long
    },
    "all weights": {
        "finetuning_type": "full",
        "prompts_per_step": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": PROMPTS[:3],
        "per_device_eval_batch_size": 4,
    },
}


def make(
    output_dir, *, reward_funcs=even_ids, eval_dataset=None, model=None, acts=False, **changes
):
    options = {
        "output_dir": str(output_dir),
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
        "adam_epsilon": 1e-3,  # else Adam makes full steps of the rounding of gradients near 0
    }
    if torch.distributed.is_initialized():  # nothing may depend on the global generator
        torch.manual_seed(torch.distributed.get_rank())
    # Where bf16 is left open this machine counts as one that has it.
    with mock.patch.object(host, "has_bfloat16", lambda device: True):
        if acts:
            return acting(reward_funcs, options | changes)
        return made(model, reward_funcs, options | changes, eval_dataset)


def acting(reward_funcs, options):
    return GRPOTrainer(
        model=caller.model(),
        reward_funcs=reward_funcs,
        args=GRPOConfig(**options),
        train_dataset=caller.PROMPTS,
        environment_factory=caller.Counter,
        tokenizer=caller.tokenizer(),
    )


def made(model, reward_funcs, options, eval_dataset):
    return GRPOTrainer(
        model=tiny.model() if model is None else model,
        reward_funcs=reward_funcs,
        args=GRPOConfig(**options),
        train_dataset=PROMPTS,
        eval_dataset=eval_dataset,
        tokenizer=tiny.tokenizer(),
    )


class StopsInTheLastProcess(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        control.should_training_stop |= last and state.global_step == 2


class Hub:
    """Takes the place of ``huggingface_hub.HfApi``: notes which process calls it, and refuses
    uploads to ``refused``."""

    notes: ClassVar[Path]

    def note(self, *said):
        with (self.notes / f"hub{torch.distributed.get_rank()}.txt").open("a") as file:
            print(*said, file=file)

    def create_repo(self, repo_id, **more):
        self.note("create", repo_id)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, commit_message, **more):
        self.note("upload", repo_id, Path(folder_path).name, commit_message)
        if repo_id == "refused":
            raise OSError("no such right")
        return "done"


def push(directory):
    """A run that pushes its checkpoint and its end, and one whose Hub takes neither."""
    Hub.notes = directory
    options = RUNS["fewer prompts than processes"] | {
        "max_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "push_to_hub": True, "hub_strategy": "every_save",
    }  # fmt: skip
    with mock.patch("huggingface_hub.HfApi", Hub):
        for name in ("taken", "refused"):
            make(directory / name, hub_model_id=name, **options).train()


def run_all(directory):
    for name, options in RUNS.items():
        trainer = make(directory / name, **options)
        trainer.train()
        trainable = {n: p.detach().clone() for n, p in trainer.policy.trainable()}
        rank = trainer.processes.rank
        torch.save(trainable, directory / name / f"weights{rank}.pt")
    stopped = make(directory / "stopped", **RUNS["fewer prompts than processes"])
    stopped.add_callback(StopsInTheLastProcess())
    stopped.train()
    # A checkpoint for a run of another number of processes, in the middle of a window.
    options = RUNS["a window with kl"] | {"save_strategy": "steps", "save_steps": 2}
    make(directory / "saved", **options).train()
    # And the other way round, where there is one from a single process.
    if (directory / "from_one").exists():
        make(directory / "from_one", **options).train(resume_from_checkpoint=True)
    push(directory)


def fails_in_process_1(completion_ids, **kwargs):
    if torch.distributed.get_rank():
        raise ValueError("no reward here")
    return even_ids(completion_ids)


if __name__ == "__main__":
    if sys.argv[2:] == ["fails"]:
        make(sys.argv[1], reward_funcs=fails_in_process_1).train()
    else:
        run_all(Path(sys.argv[1]))
