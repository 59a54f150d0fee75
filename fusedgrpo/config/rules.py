"""Rules between options: which combinations cannot be run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fusedgrpo.errors import brief, did_you_mean
from fusedgrpo.loss_options import LOSS_TYPES

# Per rollout: its prompts, texts and rewards are in memory together.
MOST_COMPLETIONS = 1 << 20

# What Liger has for layers, and its losses, by their names in transformers.
LIGER_PARTS = ("rope", "rms_norm", "swiglu", "geglu")
LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")

# Options that name one of ours, or code of the user's as ``file.py:name`` or ``module:name``.
EXTENSIBLE: dict[str, tuple[str, ...]] = {
    "loss_type": LOSS_TYPES,
    "advantage_estimator": ("group",),
    "sampler": ("auto", "generate", "decoder"),
    "prompt_selection": ("uniform", "informative"),
    "dataset_format": ("auto", "prompt", "alpaca", "sharegpt", "openai"),
}


def one_of(option: str) -> str:
    """The values of such an option, for its help."""
    return f"{', '.join(EXTENSIBLE[option])}, file.py:name or module:name"


def contradictions(c: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The options that a broken rule is about, the one to blame first, and what is wrong."""
    for name, known in EXTENSIBLE.items():
        value = getattr(c, name)
        if value not in known and not all(value.rpartition(":")):
            text = f"{name}: {brief(value)} is none of {one_of(name)}."
            yield (name,), text + did_you_mean(value, known)
    if not c.do_train:
        yield ("do_train",), "do_train: false leaves nothing to do; set it to true."
    if c.bf16 and c.fp16:
        yield ("bf16", "fp16"), "bf16 and fp16 cannot both be true; choose one."
    if c.load_in_4bit and c.finetuning_type == "full":
        yield (
            ("load_in_4bit", "finetuning_type"),
            "load_in_4bit: 4-bit weights cannot be trained; set finetuning_type: lora.",
        )
    adapter = c.adapter_name_or_path
    if adapter and "," in adapter and not Path(adapter).expanduser().exists():
        yield (
            ("adapter_name_or_path",),
            f"adapter_name_or_path: {adapter} are several; one is trained "
            "further. Merge the others into the model first (merge_and_unload of peft).",
        )
    if adapter and c.finetuning_type == "full":
        yield (
            ("adapter_name_or_path", "finetuning_type"),
            "adapter_name_or_path: finetuning_type: full trains the model and no adapter; set "
            "finetuning_type: lora, or merge the adapter into the model first.",
        )
    if c.rollout_weights != "auto" and c.finetuning_type == "full":
        yield (
            ("rollout_weights", "finetuning_type"),
            f"rollout_weights: {c.rollout_weights} is about an adapter, and finetuning_type: full "
            "trains the model itself; leave it at auto.",
        )
    if c.rollout_weights == "merged" and c.sampler not in ("auto", "decoder"):
        yield (
            ("rollout_weights", "sampler"),
            f"rollout_weights: merged is for our own decoder, and sampler: {c.sampler} takes the "
            "model as it is; leave it at auto, or set sampler: decoder.",
        )
    if c.activation_offloading and not c.gradient_checkpointing:
        yield (
            ("activation_offloading", "gradient_checkpointing"),
            "activation_offloading: what is offloaded are the layers' inputs that gradient "
            "checkpointing keeps; set gradient_checkpointing: true.",
        )
    if c.gguf_file and not c.model_name_or_path:
        yield (
            ("gguf_file", "model_name_or_path"),
            "gguf_file: set model_name_or_path to the directory or Hub id that holds it.",
        )
    if c.generation_batch_size and c.steps_per_generation:
        yield (
            ("generation_batch_size", "steps_per_generation"),
            "generation_batch_size and steps_per_generation say the same thing; give one.",
        )
    if (count := _rollout_size(c)) > MOST_COMPLETIONS:
        yield (
            ("prompts_per_step", "num_generations", "per_device_train_batch_size",
             "gradient_accumulation_steps", "generation_batch_size", "steps_per_generation"),
            f"a rollout of {count:,} completions can never be kept: at most "
            f"{MOST_COMPLETIONS:,}. Lower prompts_per_step, num_generations or the batch sizes.",
        )  # fmt: skip
    if c.prompt_selection != "uniform" and not c.shuffle_dataset:
        yield (
            ("prompt_selection", "shuffle_dataset"),
            f"prompt_selection: {c.prompt_selection} draws prompts, and shuffle_dataset: false "
            "asks for them in the order of the data; leave one of them out.",
        )
    if c.max_length and c.max_length <= c.max_completion_length:
        yield (
            ("max_length", "max_completion_length"),
            f"max_length: {c.max_length} leaves no room for a prompt; max_completion_length is "
            f"{c.max_completion_length}.",
        )
    if c.max_steps == 0:
        yield (
            ("max_steps",),
            "max_steps: 0 trains nothing; -1 takes num_train_epochs, or give a number >= 1.",
        )
    if c.val_size and c.eval_dataset:
        yield (
            ("val_size", "eval_dataset"),
            "val_size and eval_dataset both name the rows to evaluate on; give one.",
        )
    for name in ("logging_steps", "save_steps", "eval_steps"):
        if not _share_or_count(getattr(c, name) or 1):
            yield (
                (name,),
                f"{name}: expected a share of the run < 1 or a whole number of steps, got "
                f"{getattr(c, name)}.",
            )
    if not all(text for text in c.stop_strings or ()):
        yield ("stop_strings",), "stop_strings: an empty text would end every completion."
    yield from _liger(c)
    yield from _best(c)
    yield from _tokens_left_out(c)
    if c.sync_ref_model and not c.beta:
        yield (
            ("sync_ref_model", "beta"),
            "sync_ref_model: without beta there is no reference to mix into; set beta above 0.",
        )
    for pair in c.optim_args.split(",") if c.optim_args else ():
        if not all(part.strip() for part in pair.partition("=")):
            yield (
                ("optim_args",),
                f"optim_args: expected name=value,name=value, got {brief(c.optim_args)}.",
            )
            break
    if not _share_or_count(c.val_size):
        yield (
            ("val_size",),
            f"val_size: expected a share < 1 or a whole number of rows, got {c.val_size}.",
        )
    if not _share_or_count(c.warmup_steps):
        yield (
            ("warmup_steps",),
            f"warmup_steps: expected a share < 1 or a whole number, got {c.warmup_steps}.",
        )
    funcs, weights = c.reward_funcs, c.reward_weights
    if funcs and weights and len(funcs) != len(weights):
        yield (
            ("reward_funcs", "reward_weights"),
            f"reward_weights: {len(weights)} weights for {len(funcs)} reward_funcs.",
        )
    if not all(isinstance(arguments, dict) for arguments in (c.reward_kwargs or {}).values()):
        yield ("reward_kwargs",), "reward_kwargs: expected {function name: {argument: value}}."
    if unknown := [name for name in c.allow_change if name not in vars(c)]:
        texts = [f"{brief(name)} is no option.{did_you_mean(name, vars(c))}" for name in unknown]
        yield ("allow_change",), ", ".join(f"allow_change: {text}" for text in texts)


def _liger(c: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Which of Liger's parts go into the layers; its losses do not."""
    for part, wanted in (c.liger_kernel_config or {}).items():
        if part not in LIGER_PARTS + LIGER_LOSSES:
            text = f"liger_kernel_config: {brief(part)} is none of {', '.join(LIGER_PARTS)}."
            yield ("liger_kernel_config",), text + did_you_mean(part, LIGER_PARTS)
        elif not isinstance(wanted, bool):
            text = f"liger_kernel_config: {part}: expected true or false, got {brief(wanted)}."
            yield ("liger_kernel_config",), text
        elif wanted and part in LIGER_LOSSES:
            yield (
                ("liger_kernel_config",),
                f"liger_kernel_config: {part} computes a loss from the model's logits, and the "
                "loss of fusedgrpo never makes them; leave it out.",
            )
    if c.liger_kernel_config is not None and not c.use_liger_kernel:
        yield (
            ("liger_kernel_config", "use_liger_kernel"),
            "liger_kernel_config: set use_liger_kernel: true, or leave it out.",
        )


def _tokens_left_out(c: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """A loss that weighs whole completions has no surrogate of a token to leave out."""
    if c.loss_type == "vespo":
        for name, asked in (
            ("top_entropy_quantile", c.top_entropy_quantile < 1),
            ("off_policy_mask_threshold", c.off_policy_mask_threshold is not None),
        ):
            if asked:
                text = f"{name}: loss_type: vespo weighs whole completions; leave it out, or "
                yield (name, "loss_type"), text + "choose another loss."
    if c.entropy_coef_min > c.entropy_coef_max:
        yield (
            ("entropy_coef_min", "entropy_coef_max"),
            f"entropy_coef_min: {c.entropy_coef_min} is above entropy_coef_max "
            f"({c.entropy_coef_max}).",
        )


def _best(c: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The best of the evaluations: there have to be some, and its weights."""
    by_metric = c.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
    if by_metric and c.warmup_steps:
        yield (
            ("warmup_steps", "lr_scheduler_type"),
            f"warmup_steps: lr_scheduler_type: {c.lr_scheduler_type} has no warm-up; leave it out.",
        )
    if c.eval_strategy == "no":
        for name, asked in (
            ("load_best_model_at_end", c.load_best_model_at_end),
            ("save_strategy", c.save_strategy == "best"),
            ("lr_scheduler_type", by_metric),
        ):
            if asked:
                text = f"{name}: the best of no evaluation; set eval_strategy: steps or epoch."
                yield (name, "eval_strategy"), text
    if c.load_best_model_at_end and c.save_strategy == "no":
        yield (
            ("load_best_model_at_end", "save_strategy"),
            "load_best_model_at_end: the weights come from a checkpoint; set save_strategy: best, "
            "steps or epoch.",
        )


def _rollout_size(config: Any) -> int:
    """About how many completions one process samples at once."""
    micro_batch = config.per_device_train_batch_size
    step = micro_batch * config.gradient_accumulation_steps
    if config.prompts_per_step is not None:
        step = config.prompts_per_step * config.num_generations
    asked = config.generation_batch_size or micro_batch * (config.steps_per_generation or 1)
    return max(step, asked, config.num_generations)


def _share_or_count(value: float) -> bool:
    return value < 1 or value == int(value)


def broken_rules(
    config: Any, skip: Collection[str] = (), of: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """``(option, message)`` of each broken rule that involves none of the options in ``skip``, and
    none but those in ``of``."""
    return [
        (names[0], text)
        for names, text in contradictions(config)
        if not set(skip).intersection(names) and (of is None or set(names) <= set(of))
    ]


def doubtful(config: Any) -> list[str]:
    """Combinations that run and are seldom meant, as TRL warns of them."""
    level, loss = config.importance_sampling_level, config.loss_type
    said = []
    if level == "sequence" and loss in ("bnpo", "dr_grpo", "dapo", "cispo"):
        said.append(
            f"importance_sampling_level: sequence with loss_type: {loss}, which sums over tokens "
            "and so weights each sequence by its completion length. GSPO is loss_type: grpo."
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
