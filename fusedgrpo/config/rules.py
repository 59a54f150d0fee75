"""Rules between options: which combinations cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusedgrpo.errors import brief, did_you_mean

if TYPE_CHECKING:
    from fusedgrpo.config.schema import GRPOConfig

# Of one rollout, whose prompts, texts and rewards are in memory together.
MOST_COMPLETIONS = 1 << 20

# (the options a rule is about, the rule: a message or something false)
_RULES: tuple[tuple[tuple[str, ...], Callable[[GRPOConfig], Any]], ...] = (
    (
        ("do_train",),
        lambda c: not c.do_train and "do_train: false leaves nothing to do; set it to true.",
    ),
    (
        ("bf16", "fp16"),
        lambda c: c.bf16 and c.fp16 and "bf16 and fp16 cannot both be true; choose one.",
    ),
    (
        ("load_in_4bit", "finetuning_type"),
        lambda c: (
            c.load_in_4bit
            and c.finetuning_type == "full"
            and "load_in_4bit: 4-bit weights cannot be trained; set finetuning_type: lora."
        ),
    ),
    (
        ("adapter_name_or_path",),
        lambda c: (
            c.adapter_name_or_path
            and "," in c.adapter_name_or_path
            and not Path(c.adapter_name_or_path).expanduser().exists()
            and f"adapter_name_or_path: {c.adapter_name_or_path} are several; one is trained "
            "further. Merge the others into the model first (merge_and_unload of peft)."
        ),
    ),
    (
        ("adapter_name_or_path", "finetuning_type"),
        lambda c: (
            c.adapter_name_or_path
            and c.finetuning_type == "full"
            and "adapter_name_or_path: finetuning_type: full trains the model and no adapter; set "
            "finetuning_type: lora, or merge the adapter into the model first."
        ),
    ),
    (
        ("activation_offloading", "gradient_checkpointing"),
        lambda c: (
            c.activation_offloading
            and not c.gradient_checkpointing
            and "activation_offloading: what is offloaded are the layers' inputs that gradient "
            "checkpointing keeps; set gradient_checkpointing: true."
        ),
    ),
    (
        ("gguf_file", "model_name_or_path"),
        lambda c: (
            c.gguf_file
            and not c.model_name_or_path
            and "gguf_file: set model_name_or_path to the directory or Hub id that holds it."
        ),
    ),
    (
        ("generation_batch_size", "steps_per_generation"),
        lambda c: (
            c.generation_batch_size
            and c.steps_per_generation
            and "generation_batch_size and steps_per_generation say the same thing; give one."
        ),
    ),
    (
        (
            *("prompts_per_step", "num_generations", "per_device_train_batch_size"),
            *("gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
        ),
        lambda c: (
            (count := _rollout_size(c)) > MOST_COMPLETIONS
            and f"a rollout of {count:,} completions can never be kept: at most "
            f"{MOST_COMPLETIONS:,}. Lower prompts_per_step, num_generations or the batch sizes."
        ),
    ),
    (
        ("max_length", "max_completion_length"),
        lambda c: (
            c.max_length
            and c.max_length <= c.max_completion_length
            and f"max_length: {c.max_length} leaves no room for a prompt; max_completion_length is "
            f"{c.max_completion_length}."
        ),
    ),
    (
        ("max_steps",),
        lambda c: (
            c.max_steps == 0
            and "max_steps: 0 trains nothing; -1 takes num_train_epochs, or give a number >= 1."
        ),
    ),
    (
        ("val_size", "eval_dataset"),
        lambda c: (
            c.val_size
            and c.eval_dataset
            and "val_size and eval_dataset both name the rows to evaluate on; give one."
        ),
    ),
    (
        ("val_size",),
        lambda c: (
            not _share_or_count(c.val_size)
            and f"val_size: expected a share < 1 or a whole number of rows, got {c.val_size}."
        ),
    ),
    (
        ("warmup_steps",),
        lambda c: (
            not _share_or_count(c.warmup_steps)
            and f"warmup_steps: expected a share < 1 or a whole number, got {c.warmup_steps}."
        ),
    ),
    (
        ("reward_funcs", "reward_weights"),
        lambda c: (
            c.reward_funcs
            and c.reward_weights
            and len(c.reward_funcs) != len(c.reward_weights)
            and f"reward_weights: {len(c.reward_weights)} weights for {len(c.reward_funcs)} "
            "reward_funcs."
        ),
    ),
    (
        ("reward_kwargs",),
        lambda c: (
            not all(isinstance(v, dict) for v in (c.reward_kwargs or {}).values())
            and "reward_kwargs: expected {function name: {argument: value}}."
        ),
    ),
    (
        ("allow_change",),
        lambda c: ", ".join(
            f"allow_change: {brief(name)} is no option.{did_you_mean(name, vars(c))}"
            for name in c.allow_change
            if name not in vars(c)
        ),
    ),
)


def _rollout_size(config: GRPOConfig) -> int:
    """About how many completions one process samples at once."""
    micro_batch = config.per_device_train_batch_size
    step = micro_batch * config.gradient_accumulation_steps
    if config.prompts_per_step is not None:
        step = config.prompts_per_step * config.num_generations
    asked = config.generation_batch_size or micro_batch * (config.steps_per_generation or 1)
    return max(step, asked, config.num_generations)


def _share_or_count(value: float) -> bool:
    return value < 1 or value == int(value)


def broken_rules(config: GRPOConfig, skip: set[str]) -> list[tuple[str, str]]:
    """``(option, message)`` of each broken rule that involves none of the options in ``skip``."""
    texts = [(names, rule(config)) for names, rule in _RULES if not skip.intersection(names)]
    return [(names[0], text) for names, text in texts if text]


def doubtful(config: GRPOConfig) -> list[str]:
    """Combinations that run and are seldom meant, as TRL warns of them."""
    level, loss = config.importance_sampling_level, config.loss_type
    said = []
    if level == "sequence" and loss in ("bnpo", "dr_grpo", "dapo", "cispo"):
        said.append(
            f"importance_sampling_level: sequence with loss_type: {loss}, which sums over tokens: "
            "a completion weighs as much as it is long. GSPO is loss_type: grpo."
        )
    if level == "token" and loss == "luspo":
        said.append(
            "loss_type: luspo with importance_sampling_level: token; LUSPO is with the level of "
            "the sequence."
        )
    if level == "sequence" and loss == "vespo":
        said.append(
            "loss_type: vespo with importance_sampling_level: sequence; VESPO weighs sequences "
            "itself, and is with the level of the token."
        )
    return said
