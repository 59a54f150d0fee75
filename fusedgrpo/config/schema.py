"""``GRPOConfig``: every option of a run, checked before any model loads.

Names and defaults are TRL's where TRL has the option (the deliberate differences are listed in
``tests/config/test_aliases.py``). Other spellings are in ``config/aliases.py``.
"""

# ruff: noqa: RUF009  (option() is dataclasses.field with our metadata)
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fusedgrpo.config.aliases import ALIASES, Alias
from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.config.parsers import ParsedFields, parsed_annotations
from fusedgrpo.config.reading import Problem, label_of, left_out, plain, raise_all, resolve
from fusedgrpo.config.redaction import redacted, remember
from fusedgrpo.config.rules import broken_rules, one_of
from fusedgrpo.config.script_surface import TrainingArgumentsSurface
from fusedgrpo.config.trl_fields import as_called
from fusedgrpo.config.values import group, is_free, limits_of, option, takes_text, takes_truth
from fusedgrpo.config.yaml_file import parse_override, read_config_file
from fusedgrpo.errors import ConfigError, did_you_mean
from fusedgrpo.loss_options import ImportanceSamplingLevel, LossOptions

log = logging.getLogger("fusedgrpo")

Optimizer = Literal[
    "adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit",
    "paged_adamw_8bit", "adafactor", "sgd", "adagrad", "rmsprop", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit",
    "paged_lion_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "stable_adamw",
    "grokadamw", "adamw_anyprecision",
]  # fmt: skip
Scheduler = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
    "reduce_lr_on_plateau", "greedy",
]  # fmt: skip
# The defaults of the loss's options are written there.
_LOSS = LossOptions()


@dataclass(kw_only=True, repr=False)
class GRPOConfig(TrainingArgumentsSurface):
    """The options of a run. ``dataclasses.replace(config, beta=0.04)`` makes another; an option
    that is set is checked like one that is given, with others when a trainer is made; one that was
    made before says that it keeps what it has.

    Raises ConfigError with all violations at once: unknown names, names of options that other
    trainers have and this one has not, wrong types, values out of range, contradictions.
    """

    group("model")
    model_name_or_path: str | None = option(None, "model directory or Hub id")
    model_revision: str | None = option(None, "branch, tag or commit of a Hub model")
    tokenizer_name_or_path: str | None = option(None, "tokenizer, if not the model's own")
    gguf_file: str | None = option(None, "GGUF file inside model_name_or_path")
    trust_remote_code: bool = option(False, "run the Python code of the model repository")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype of the frozen weights; auto: as stored, or as they compute"
    )
    attn_implementation: str | None = option(None, "attention implementation of transformers")
    model_init_kwargs: dict[str, Any] | None = option(None, "more arguments of from_pretrained")
    use_liger_kernel: bool = option(
        False, "Liger's RMSNorm, RoPE and gated MLP in the layers, on a GPU (fusedgrpo[liger])"
    )
    liger_kernel_config: dict[str, Any] | None = option(
        None, "which of them: rope, rms_norm, swiglu, geglu; null: all"
    )

    group("adapter")
    stage: Literal["grpo"] = option("grpo", "the only training stage")
    finetuning_type: Literal["lora", "full"] = option("lora", "train a LoRA adapter or all weights")
    adapter_name_or_path: str | None = option(
        None, "adapter to train further: a directory or Hub id"
    )
    lora_r: int = option(16, "rank of the adapter", low=1)
    lora_alpha: int | None = option(None, "scale of the adapter; null: 2 * lora_r", low=1)
    lora_dropout: float = option(0.0, "dropout in the adapter while training", low=0, below=1)
    lora_target_modules: str | list[str] = option("all-linear", "module names, or all-linear")
    disable_dropout: bool = option(True, "no dropout of the model's own while it trains")
    use_rslora: bool = option(False, "scale the adapter by alpha / sqrt(r)")
    load_in_4bit: bool = option(False, "load the frozen weights in 4 bits (QLoRA)")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit number format")
    use_bnb_nested_quant: bool = option(True, "quantise the 4-bit scales too")

    group("data")
    dataset: str | None = option(
        None, "file, directory, name in dataset_dir or Hub name", free=True
    )
    task_options: dict[str, Any] | None = option(
        None,
        "of dataset: reasoning_gym:NAME: size, held_out_size, seed, and by the name of a task its "
        "difficulty",
    )
    dataset_dir: str = option("data", "where dataset_info.json and named data sets are", free=True)
    eval_dataset: str | None = option(None, "data set for evaluation", free=True)
    dataset_format: str = option(
        "auto", f"where the prompt is in a row: {one_of('dataset_format')}"
    )
    val_size: float = option(
        0.0, "rows held out for evaluation: a share if < 1, else a count", low=0
    )
    max_samples: int | None = option(None, "use at most the first rows of each data set", low=1)
    template: str | None = option(None, "name of the chat template expected in the tokenizer")
    system_prompt: str | None = option(None, "system message for rows that have none")
    max_prompt_length: int | None = option(None, "refuse longer prompts (tokens)", low=1)
    max_length: int | None = option(None, "limit of prompt + completion (tokens)", low=2)
    on_bad_row: Literal["error", "skip"] = option("error", "unusable rows: stop, or list and skip")
    shuffle_dataset: bool = option(True, "shuffle the prompts in each epoch")
    text_as_user_turn: bool = option(
        False, "render text prompts with the chat template, as the turn of a user"
    )
    prompt_add_special_tokens: bool = option(
        True, "let the tokenizer add its BOS or EOS to text prompts"
    )
    chat_template_kwargs: dict[str, Any] | None = option(None, "variables of the chat template")

    group("batch")
    num_generations: int = option(8, "completions per prompt: the group size", low=2, high=65536)
    num_generations_eval: int | None = option(
        None, "group size in evaluation; null: num_generations", low=1, high=65536, free=True
    )
    max_completion_length: int = option(512, "limit of a completion (tokens)", low=1)
    per_device_train_batch_size: int = option(8, "completions per device and micro-batch", low=1)
    per_device_eval_batch_size: int = option(
        8, "completions sampled together in eval", low=1, free=True
    )
    gradient_accumulation_steps: int = option(1, "micro-batches per optimizer step", low=1)
    prompts_per_step: int | None = option(
        None, "prompts per optimizer step; null: from the batch sizes", low=1
    )
    generation_batch_size: int | None = option(None, "completions sampled in one go", low=1)
    steps_per_generation: int | None = option(
        None, "micro-batches served by one sampling; null: one optimizer step", low=1
    )
    num_iterations: int = option(1, "optimizer passes over each rollout", low=1)
    dynamic_sampling: bool = option(
        False, "sample other prompts in the place of groups whose rewards do not differ (DAPO)"
    )
    prompt_selection: str = option(
        "uniform",
        "which prompts come next: each once in an epoch; by the signal they promise; by weights of "
        f"yours; the lowest of a column first: {one_of('prompt_selection')}, column:NAME",
    )
    max_sampling_rounds: int = option(
        4, "most prompts that dynamic_sampling takes, as a multiple of a rollout's", low=2
    )
    tokens_per_microbatch: int | None = option(
        None, "packed tokens per forward pass; null: chosen for the device", low=1
    )
    shared_prompt: Literal["auto", "on", "off"] = option(
        "auto", "forward a prompt once for all its completions, if the model can"
    )

    group("sampling")
    temperature: float = option(1.0, "divides the logits, in sampling and in scoring", above=0)
    top_p: float = option(1.0, "nucleus sampling", above=0, high=1)
    top_k: int = option(0, "sample from the k most likely tokens; 0: from all", low=0)
    min_p: float | None = option(
        None, "minimum share of the best token's probability", low=0, high=1
    )
    repetition_penalty: float = option(1.0, "above 1 discourages repeated tokens", above=0)
    stop_strings: list[str] | None = option(
        None, "texts that end a completion, beside the EOS; they stay in it"
    )
    generation_kwargs: dict[str, Any] | None = option(
        None, "more of the sampling options above, by their names in generate"
    )
    structured_outputs: dict[str, Any] | None = option(
        None,
        "what a completion has to match, one of regex: text, json: schema or its file, choice: "
        "list of texts, grammar: Lark; tokens that cannot go on that way are not drawn",
    )
    skip_special_tokens: bool = option(
        True, "leave special tokens out of texts; false keeps all but the EOS at their end"
    )
    sampler: str = option("auto", f"what draws the completions: {one_of('sampler')}")
    rollout_weights: Literal["adapter", "merged", "auto"] = option(
        "auto", "completions come from base and adapter, or from a merged copy, if it fits"
    )
    max_in_flight: int | None = option(
        None, "completions decoded together; null: what the plan says, or all", low=1, free=True
    )

    group("loss")
    beta: float = option(_LOSS.beta, "weight of the KL to the reference; 0: no reference", low=0)
    epsilon: float = option(_LOSS.epsilon, "lower clip bound of the ratio", low=0)
    epsilon_high: float | None = option(
        _LOSS.epsilon_high, "upper clip bound; null: epsilon", low=0
    )
    delta: float | None = option(_LOSS.delta, "cap of the ratio for negative advantages", above=1)
    loss_type: str = option(_LOSS.loss_type, f"the surrogate: {one_of('loss_type')}")
    importance_sampling_level: ImportanceSamplingLevel = option(
        _LOSS.importance_sampling_level, "what has a ratio of its own, a token or a sequence"
    )
    use_bias_correction_kl: bool = option(
        _LOSS.use_bias_correction_kl, "multiply the KL by the ratio"
    )
    sapo_temperature_pos: float = option(
        _LOSS.sapo_temperature_pos, "SAPO's temperature of positive advantages", above=0
    )
    sapo_temperature_neg: float = option(
        _LOSS.sapo_temperature_neg, "SAPO's temperature of negative advantages", above=0
    )
    vespo_k_pos: float = option(_LOSS.vespo_k_pos, "VESPO's k of positive advantages", low=0)
    vespo_lambda_pos: float = option(
        _LOSS.vespo_lambda_pos, "VESPO's lambda of positive advantages", low=0
    )
    vespo_k_neg: float = option(_LOSS.vespo_k_neg, "VESPO's k of negative advantages", low=0)
    vespo_lambda_neg: float = option(
        _LOSS.vespo_lambda_neg, "VESPO's lambda of negative advantages", low=0
    )
    mask_truncated_completions: bool = option(False, "leave cut completions out of the loss")
    top_entropy_quantile: float = option(
        1.0, "share of tokens, those with the most entropy, that the policy learns from",
        above=0, high=1,
    )  # fmt: skip
    off_policy_mask_threshold: float | None = option(
        None, "leave out completions with a negative advantage this far off policy (mean log-ratio)"
    )
    entropy_coef: float = option(0.0, "weight of the entropy bonus; adaptive: to begin with", low=0)
    use_adaptive_entropy: bool = option(False, "move entropy_coef towards entropy_target")
    entropy_coef_min: float = option(0.0, "lowest adaptive entropy_coef", low=0)
    entropy_coef_max: float = option(1.0, "highest adaptive entropy_coef", low=0)
    entropy_coef_delta: float = option(0.005, "change of adaptive entropy_coef in a step", low=0)
    entropy_target: float = option(0.2, "mean entropy (nats) at and below which it acts", low=0)
    sync_ref_model: bool = option(False, "mix the policy into the reference now and then")
    ref_model_mixup_alpha: float = option(
        0.6, "share of the policy that sync_ref_model mixes in", low=0, high=1
    )
    ref_model_sync_steps: int = option(512, "steps between two mixes of sync_ref_model", low=1)
    router_aux_loss_coef: float | None = option(
        None, "weight of a mixture of experts' load-balancing loss; null: the model's own", low=0
    )
    sampler_correction: bool = option(False, "weigh tokens by exp(old logp - sampler logp)")
    sampler_correction_cap: float = option(
        3.0, "upper bound of the weight of sampler_correction", above=0
    )

    group("rewards")
    reward_funcs: Any = option(
        None,
        "what rewards: names, module:function, file.py:function, or callables; null: the verifier "
        "of a reasoning_gym task",
    )
    reward_weights: list[float] | None = option(None, "one weight per reward function; null: 1")
    reward_kwargs: dict[str, Any] | None = option(
        None, "arguments of reward functions: {function name: {argument: value}}"
    )
    scale_rewards: Literal["group", "batch", "none"] = option(
        "group", "whose standard deviation advantages are divided by"
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", "how several rewards become one advantage"
    )
    advantage_estimator: str = option(
        "group", f"from rewards to advantages: {one_of('advantage_estimator')}"
    )
    on_reward_error: Literal["halt", "drop"] = option(
        "halt", "when a reward function fails: stop, or no reward"
    )
    reward_timeout: float | None = option(
        300.0,
        "seconds that reward functions in a worker process and async ones have for a batch",
        above=0,
        free=True,
    )

    group("tools")
    tools: list[str] | None = option(
        None, "functions that the policy may call: file.py:function or module:function"
    )
    environment_factory: str | dict[str, Any] | None = option(
        None,
        "class of the environment that each completion acts on, file.py:name or module:name; "
        "several: {name: class}, by the data's column environment",
    )
    max_tool_calling_iterations: int | None = option(
        None, "most turns of a completion that are answered by tools; null: any number", low=1
    )
    tool_timeout: float | None = option(
        60.0, "seconds that a call of a tool, or of an environment, has", above=0, free=True
    )
    tool_output_limit: int = option(
        10_000, "characters of a tool's answer; what is longer is cut, and says so", low=1
    )
    on_tool_error: Literal["message", "halt"] = option(
        "message", "when a tool fails: the policy is told, or the run stops"
    )

    group("optimizer")
    learning_rate: float | None = option(
        None, "peak learning rate; null: 3e-5 for an adapter, 1e-6 for all weights", low=0
    )
    weight_decay: float = option(0.0, "AdamW's weight decay", low=0)
    adam_beta1: float = option(0.9, "AdamW's first beta", low=0, below=1)
    adam_beta2: float = option(0.999, "AdamW's second beta", low=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = option(1.0, "clip the gradient norm; 0: never", low=0)
    optim: Optimizer = option("adamw_torch_fused", "the optimizer, by its name in transformers")
    optim_args: str | None = option(None, "more settings of the optimizer: name=value,name=value")
    lr_scheduler_type: Scheduler = option(
        "linear", "schedule of the learning rate, by its name in transformers"
    )
    lr_scheduler_kwargs: dict[str, Any] | None = option(None, "more settings of the schedule")
    warmup_steps: float = option(0.0, "steps of warm-up, or its share of the run if < 1", low=0)
    num_train_epochs: float = option(3.0, "passes over the data", above=0)
    max_steps: int = option(-1, "optimizer steps; -1: from num_train_epochs", low=-1)
    max_nonfinite_steps: int = option(
        0, "non-finite updates skipped in a row before a halt", low=0, free=True
    )

    group("precision and memory")
    bf16: bool | None = option(None, "compute in bfloat16; null: where the device has it")
    fp16: bool = option(False, "compute in float16")
    gradient_checkpointing: bool = option(True, "recompute activations in the backward pass")
    activation_offloading: bool | None = option(
        None, "keep checkpointed activations in host memory; null: if the plan needs it", free=True
    )
    gpu_memory: str | None = option(
        None, "size of the card to plan for, such as 24GB; null: that of the device", free=True
    )
    rehearsal: bool | None = option(
        None, "try the greatest lengths before step 1; null: on a GPU", free=True
    )
    use_cpu: bool = option(False, "stay on the CPU")
    tf32: bool | None = option(
        None, "float32 products of a GPU in TF32; null: as torch is set, which is not"
    )
    full_determinism: bool = option(
        False, "torch's deterministic algorithms, with a warning where it has none", free=True
    )

    group("run")
    do_train: bool = option(True, "this program only trains")
    output_dir: str = option("trainer_output", "everything a run writes", free=True)
    overwrite_output_dir: bool = option(
        False, "delete a previous run there instead of moving it", free=True
    )
    seed: int = option(42, "seed of every random choice", low=0)
    data_seed: int | None = option(None, "seed of the order of the prompts; null: seed", low=0)
    logging_strategy: Literal["no", "steps", "epoch"] = option(
        "steps", "when to show a line; metrics.jsonl has every step", free=True
    )
    logging_steps: int | float = option(
        10, "show a line every so many steps, or that share of the run if < 1", above=0, free=True
    )
    logging_first_step: bool = option(False, "count the first step as logged", free=True)
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "steps", "when to checkpoint; best: after each best evaluation", free=True
    )
    save_steps: int | float = option(
        500, "steps between checkpoints, or a share of the run if < 1", above=0, free=True
    )
    save_total_limit: int | None = option(
        None, "checkpoints to keep beside the best; null: all", low=1, free=True
    )
    save_only_model: bool = option(
        False, "checkpoints of the weights alone, which no run goes on from", free=True
    )
    eval_strategy: Literal["no", "steps", "epoch"] = option("no", "when to evaluate", free=True)
    eval_steps: int | float | None = option(
        None,
        "steps between evaluations, or a share of the run if < 1; null: logging_steps",
        above=0,
        free=True,
    )
    eval_on_start: bool = option(False, "evaluate before the first step, too", free=True)
    held_out_check: bool = option(
        True,
        "for the report, answer at most 128 held-out prompts greedily before, during and after "
        "the run",
        free=True,
    )
    drift_check: bool = option(
        True,
        "for the report, score at most 8 completions of about 10 steps before and after the "
        "update, and under the reference",
        free=True,
    )
    load_best_model_at_end: bool = option(
        False, "end with the weights of the best evaluation, each of which is saved", free=True
    )
    metric_for_best_model: str | None = option(
        None, "what of an evaluation is compared; null: the reward", free=True
    )
    greater_is_better: bool | None = option(
        None, "whether more of it is better; null: unless its name ends in loss", free=True
    )
    resume_from_checkpoint: str | None = option(
        None, "checkpoint to go on from: a path; true or auto: the newest", free=True
    )
    allow_change: tuple[str, ...] = option(
        (), "options that may differ from the checkpoint's", free=True
    )
    report_to: str | list[str] = option("none", "trackers beside metrics.jsonl", free=True)
    project: str | None = option(
        None,
        "project or experiment in the trackers; null: that of their environment variables, such as "
        "WANDB_PROJECT, or fusedgrpo",
        free=True,
    )
    run_name: str | None = option(
        None,
        "name of the run in the trackers; null: that of their environment variables, such as "
        "WANDB_NAME, or of output_dir",
        free=True,
    )
    logging_dir: str | None = option(
        None,
        "where TensorBoard, Aim, W&B and SwanLab write files; null: the first two to trackers in "
        "output_dir, the others where they do by themselves",
        free=True,
    )
    trackio_space_id: str | None = option(
        None, "Space on the Hugging Face Hub for trackio's board; null: on this machine", free=True
    )
    disable_tqdm: bool | None = option(
        None, "true: lines in place of the live panel in a terminal", free=True
    )
    dataloader_num_workers: int = option(
        0, "taken and without effect: prompts are read once, by this process", low=0, free=True
    )
    accelerator_config: dict[str, Any] | None = option(
        None,
        "taken and without effect: accelerate's data loaders are not used; what of it would be "
        "another run is refused",
        free=True,
    )
    push_to_hub: bool = option(
        False, "upload the result, and what hub_strategy says, to the Hugging Face Hub", free=True
    )
    hub_model_id: str | None = option(
        None, "repository of push_to_hub; null: the name of output_dir", free=True
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "every_save",
        "what push_to_hub uploads: the result; the weights of each checkpoint too; the last "
        "checkpoint whole; or each",
        free=True,
    )
    hub_token: str | None = option(
        None, "token of push_to_hub; null: HF_TOKEN or the one that is logged in", free=True
    )
    hub_private_repo: bool | None = option(
        None, "make the repository of push_to_hub a private one", free=True
    )
    hub_revision: str | None = option(None, "branch of push_to_hub; null: main", free=True)
    log_completions: bool = option(False, "show sample completions", free=True)
    num_completions_to_print: int | None = option(
        None, "sample completions to show at a time; null: all", low=1, free=True
    )
    log_completions_steps: int = option(
        1, "show sample completions of one rollout in so many steps", low=1, free=True
    )

    if not TYPE_CHECKING:  # type checkers and editors see the generated signature

        def __init__(self, /, *output_dir: Any, **given: Any):
            ParsedFields.of(type(self))
            if len(output_dir) > 1 or (output_dir and "output_dir" in given):
                raise ConfigError("Options are given by name, and output_dir once.")
            if output_dir:
                given["output_dir"] = output_dir[0]
            given = as_called(given, {spec.name: spec.default for spec in fields(self)})
            derived = [spec for spec in fields(self) if spec.name not in _HINTS]
            own = {spec.name: given.pop(spec.name) for spec in derived if spec.name in given}
            values, problems = resolve(given, _HINTS, _LIMITS)
            for spec in fields(self):
                value = {**own, **values}.get(spec.name, MISSING)
                if value is MISSING:
                    made = spec.default_factory
                    value = spec.default if made is MISSING else made()
                if value is MISSING:
                    problems.append((spec.name, f"{spec.name}: is missing and has no default."))
                object.__setattr__(self, spec.name, value)
            remember(values)
            problems += left_out(values)
            problems += broken_rules(self, skip={name for name, _ in problems})
            raise_all(problems)
            if derived and hasattr(self, "__post_init__"):
                self.__post_init__()

        def __init_subclass__(cls) -> None:
            # ``dataclass`` leaves an ``__init__`` alone that a class has itself.
            if "__init__" not in vars(cls):
                cls.__init__ = GRPOConfig.__init__

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith("_") or (name not in _HINTS and name in _own_fields(self)):
                object.__setattr__(self, name, value)  # private, or of a derived class
                return
            values, problems = resolve({name: value}, _HINTS, _LIMITS)
            before = {option: getattr(self, option) for option in values}
            for option, read in values.items():
                object.__setattr__(self, option, read)
            # Rules between options are for the end: a script sets one after the other.
            problems += broken_rules(self, of=values)
            if problems:
                for option, read in before.items():
                    object.__setattr__(self, option, read)
                raise_all(problems)
            changed = [option for option in values if values[option] != before[option]]
            if changed and vars(self).get("_used"):
                log.warning(
                    "%s was changed after a trainer was made from this configuration: what that "
                    "trainer has built already stays as it is.",
                    ", ".join(changed),
                )

        def __getattr__(self, name: str) -> Any:
            # Called for what is no option. Those of other trainers read as they would there.
            if name in REFUSED:
                return next(iter(REFUSED[name].harmless), None)
            if name in ALIASES and ALIASES[name].convert is None:
                return getattr(self, ALIASES[name].option)
            if name in ALIASES:
                raise AttributeError(f"{name} is read from {ALIASES[name].option} here.")
            raise AttributeError(f"GRPOConfig has no option {name!r}.{did_you_mean(name, _HINTS)}")

    def __repr__(self) -> str:
        return f"GRPOConfig(**{self.to_record()!r})"

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> GRPOConfig:
        """The configuration that a mapping of option names (any known spelling) describes."""
        return cls(**{label_of(key): value for key, value in options.items()})

    @classmethod
    def from_file(
        cls, path: str | Path | None, overrides: Mapping[str, str | None] | None = None
    ) -> GRPOConfig:
        """Read a YAML or JSON file, or none. ``overrides`` win: text, as typed on a command line,
        or None for an option without a value, which can only mean true."""
        typed: dict[str, Any] = {}
        bare: list[Problem] = []
        for key, text in (overrides or {}).items():
            alias = ALIASES.get(key, Alias(key))
            hint = _HINTS.get(alias.option, bool)
            if text is None and alias.convert is None and not takes_truth(hint):
                bare.append((alias.option, f"{label_of(key)}: has no value on the command line."))
            elif text is None:
                typed[key] = True
            else:
                typed[key] = text if alias.verbatim else parse_override(text, takes_text(hint))
        values, problems = resolve({} if path is None else read_config_file(path), _HINTS, _LIMITS)
        winning, more = resolve(typed, _HINTS, _LIMITS)
        raise_all(problems + more + bare)
        return cls(**{**values, **winning})

    def to_dict(self) -> dict[str, Any]:
        """All options as plain JSON and YAML types; callables by their import path."""
        return {spec.name: plain(getattr(self, spec.name)) for spec in fields(self)}

    def to_record(self) -> dict[str, Any]:
        """``to_dict()`` as it is stored and shown, a mark in place of keys, passwords, tokens."""
        return redacted(self.to_dict())


def _own_fields(config: GRPOConfig) -> set[str]:
    return {spec.name for spec in fields(config)}


_HINTS: dict[str, Any] = get_type_hints(GRPOConfig)
# After the hints are taken: from here on the annotations are what argparse reads.
GRPOConfig.__annotations__ |= parsed_annotations(_HINTS)
# The annotation leaves out bool, as in transformers: HfArgumentParser refuses a union of text and
# bool.
_HINTS["resume_from_checkpoint"] = str | bool | None
_LIMITS = {spec.name: limits_of(spec) for spec in fields(GRPOConfig)}
ParsedFields.of(GRPOConfig)


def free_to_change() -> set[str]:
    """The options that a resumed run may have other values of."""
    return {spec.name for spec in fields(GRPOConfig) if is_free(spec)}


def type_of(name: str) -> Any:
    """The type that an option is read as."""
    return _HINTS[name]
