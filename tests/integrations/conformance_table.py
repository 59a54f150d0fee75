"""Writes docs/trl-conformance.md: what of TRL was compared, from the lists that the tests run on.

python tests/integrations/conformance_table.py > docs/trl-conformance.md
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import textwrap
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import conformance
from conformance import DRAWS
from test_trl_native_loss import CASES as NATIVE
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl_runs import LORA_RUN, ONLY_TRLS_LOSS, RLOO_RUNS, RUNS, TOLERANCE

from fusedgrpo.integrations import trl_rollouts
from fusedgrpo.integrations.trl_version import TESTED

# What the axes have besides options of TRL.
IN_THE_BATCH = {
    "accumulation_window": "`current_gradient_accumulation_steps` (a short last window)",
    "advantages": "advantages of exactly 0",
    "tools": "`tool_mask` (`tools`, `environment_factory`, `env_mask` of a `rollout_func`)",
    "mode": "training or evaluation",
    "all_truncated": "not one token left in the loss",
}
# Neither in a case nor in a run.
NOT_COMPARED = {
    "disable_dropout": "true in every comparison: where a model has dropout, the two draw other "
    "masks",
    "quantization_config": "not compared; our forward runs the layers as they are",
    "tools": "the mask they leave is (below); their loop is TRL's",
    "environment_factory": "as `tools`",
    "processing_class": "tokenizers are; with a multimodal processor TRL's own forward runs, and "
    "`fused_loss=True` is refused",
}
# Used by TRL before and after the forward and the loss, in code that stays its own.
UNTOUCHED = {
    "loading": ("model_init_kwargs", "trust_remote_code", "ds3_gather_for_generation"),
    "data": ("args", "train_dataset", "shuffle_dataset", "num_generations_eval",
             "chat_template_kwargs"),
    "generation": ("top_p", "min_p", "repetition_penalty", "generation_kwargs",
                   "cache_implementation", "max_tool_calling_iterations",
                   "use_transformers_continuous_batching",
                   "transformers_continuous_batching_config", "use_transformers_paged"),
    "vLLM": ("vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode",
             "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host",
             "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
             "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
             "vllm_importance_sampling_cap"),
    "rewards, optimizer, logs": ("reward_processing_classes", "callbacks", "optimizers",
                                 "log_multimodal", "log_unique_prompts",
                                 "log_completions_hub_repo"),
}  # fmt: skip

# Counted by hand on COUNTED: of TRL's own tests that stock TRL passes, those that pass through the
# native trainer, by what the script changes; and how many of the first row do not, by cause.
COUNTED = "2026-11-26"
STOCK_PASSES = 110
PASSED = {
    'the imports of trainer and config, and `finetuning_type="full"` where there is no '
    "`peft_config`": "105",
    "the imports of trainer and config": "56",
}
NOT_PASSED = {
    "methods and private names of TRL's step are replaced or read (`training_step`, `_generate`, "
    "`_logs`, `get_train_dataloader`)": 4,
    "beam search in `generation_kwargs` is refused: what a search finds is no draw from the "
    "policy": 1,
}
# Counted by hand on ACTED: of those that need jmespath, which are about tools and environments.
ACTED = "2026-11-27"
ACT_PASSES = 7
ACT_NOT_PASSED = {
    "an attribute of the trainer holds the environments after the run; here each ends with its "
    "completion, and a reward function with an argument `environments` is given copies": 1,
    "environments write to lists of the test's own process, and run in another; private names are "
    "read": 1,
    "the function that TRL makes of `get_reward` is called with environments of the test's own": 1,
    "a row that names an unknown environment is refused when the trainer is made, not in the first "
    "step": 1,
    "a call that cannot be read ends the completion; here the policy is told why, and goes on": 1,
}
# Compared by hand on ACTED.
SIDE_BY_SIDE = """
    Side by side, on the same turns of a policy in an environment whose calls work, fail, are
    unknown or wrong, are async, two of a turn or return lists: reward functions get the same
    prompts, messages, columns and states of environments, and the metrics are the same. The words
    of errors differ, and what the policy reads of a tool's list: its text, where TRL with Qwen3's
    template gives it nothing."""
# Run by hand on COUNTED, and grpo_2048.py on ACTED.
SCRIPTS = """
    **TRL's scripts**, with the imports of trainer and config changed, a tiny model, few steps and
    stand-ins for data sets and the Hub. `trl/scripts/grpo.py` runs, plain, with evaluations, with
    `--use_peft --push_to_hub`, `--use_peft --load_in_4bit` on a CPU, `--dataset_streaming` and
    `--reward_model_name_or_path` (that of the TRL that is installed is a test,
    `tests/engine/test_trl_scripts.py`), and so do `gspo.py`, `grpo_continuous_batching.py`, the
    notebooks `grpo_trl_lora_qlora` (float16 in 4-bit products is a GPU's: float32 on a CPU) and
    `grpo_rnj_1_instruct`, and `EarlyStoppingCallback`, `PrinterCallback` and TRL's
    `RichProgressCallback`, `BEMACallback` and `SyncRefModelCallback`. Refused by name are
    `--use_vllm` and `--load_in_8bit`, and the images of `grpo_vlm.py`. A step of `grpo_2048.py`
    runs, with its environment; `grpo_agent.py` was refused before there were tools, and not tried
    again."""

# Of the options of TRL, those that say how ``fused_rollouts=True`` draws a token.
ROLLOUT_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def options_of_trl():
    """The fields that ``GRPOConfig`` adds, and the arguments of ``GRPOTrainer``."""
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [f.name for f in dataclasses.fields(GRPOConfig) if f.name not in inherited]
    return own + list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]


def in_cases():
    """Option: the values that the pairs have, the default first."""
    found = {
        "loss_type": list(conformance.LOSS_TYPES),
        "importance_sampling_level": list(conformance.IMPORTANCE_SAMPLING_LEVELS),
    }
    for axes in (conformance.AXES, *conformance.OWN_AXES.values()):
        for settings in (s for axis in axes.values() for s in axis):
            for name, value in settings.items():
                values = found.setdefault(name, [conformance.DEFAULTS[name]])
                if value not in values:
                    values.append(value)
    return found


def in_runs():
    """Option: the names of the runs that set it."""
    found = {"model": list(RUNS), "reward_funcs": list(RUNS)}
    for run, options in {**RUNS, "LoRA": LORA_RUN}.items():
        for name in options:
            if run not in found.setdefault(name, []):
                found[name].append(run)
    return found


def refused_for(option, runs):
    """The loss types with which ``fused_loss=True`` refuses each setting that has the option."""
    settings = [s for axis in conformance.AXES.values() for s in axis if option in s]
    if settings:
        return [
            loss_type
            for loss_type in conformance.LOSS_TYPES
            if all(conformance.refused(loss_type, s) for s in settings)
        ]
    return list(conformance.LOSS_TYPES) if runs and set(runs) <= set(ONLY_TRLS_LOSS) else []


def show(value):
    if callable(value):
        return value.__name__
    if isinstance(value, str | int | float | bool | None):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(show, value)) + "]"
    return type(value).__name__


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def option_rows():
    cases, runs = in_cases(), in_runs()
    numbers = {name: str(k) for k, name in enumerate([*RUNS, "LoRA"], 1)}
    names = [*options_of_trl(), *cases, *runs]
    for name in dict.fromkeys(names):
        if name in IN_THE_BATCH or (name not in cases and name not in runs):
            continue
        values, own_runs = cases.get(name, []), runs.get(name, [])
        everywhere = len(own_runs) >= len(RUNS)
        by = ["pairs"] if values else []
        if own_runs:
            everywhere = len(own_runs) >= len(RUNS)
            by.append("all runs" if everywhere else "runs " + ", ".join(map(numbers.get, own_runs)))
        trl_loss, fused = "same", "same"
        if refused := refused_for(name, own_runs):
            every = len(refused) == len(conformance.LOSS_TYPES)
            fused = "refused" if every else f"same; refused with {', '.join(refused)}"
        yield [f"`{name}`", ", ".join(map(show, values)), trl_loss, fused, ", ".join(by)]


def paragraph(text):
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


def bullets(entries):
    return "\n".join(f"- {text}" for text in entries)


def code(names):
    return ", ".join(f"`{name}`" for name in names)


def listed(options):
    return ", ".join(f"`{name}={show(value)}`" for name, value in options.items())


def batch_rows():
    cases = in_cases()
    for name, text in IN_THE_BATCH.items():
        yield [text, ", ".join(map(show, cases[name])), "same", "same"]


def run_rows():
    for number, (name, options) in enumerate([*RUNS.items(), ("LoRA", LORA_RUN)], 1):
        fused = "refused" if name in ONLY_TRLS_LOSS else "same"
        yield [str(number), name, listed(options), "same", fused]


def document():
    counts = {path: sum(1 for _ in conformance.cases(path)) for path in conformance.PATHS}
    product = math.prod(len(axis) for axis in conformance.AXES.values())
    paths = ["TRL's loss on our forward", "`fused_loss=True`"]
    rloo = "; ".join(f"{name} ({listed(options)})" for name, options in RLOO_RUNS.items())
    return "\n\n".join([
        f"# Conformance with TRL {TESTED}",
        paragraph("""
            Written by `python tests/integrations/conformance_table.py` from the lists on which the
            tests run; a test fails when this page is not what it writes, or when TRL has an option
            that is not on it. Compared with stock `GRPOTrainer` are TRL's loss on our forward pass
            (`FusedGRPOTrainer`) and our loss on it (`fused_loss=True`), on tiny models in float32,
            on the CPU, in one process."""),
        paragraph(f"""
            **Pairs** (`tests/integrations/test_trl_conformance.py`): one call of `_compute_loss` on
            hand-made inputs. The loss is the same to {conformance.LOSS_TOLERANCE:g}, the gradient
            of all parameters to {conformance.GRADIENT_TOLERANCE:g} of its norm; the metrics have
            the same names, and the same values to {conformance.METRIC_TOLERANCE:g}. For each of
            {len(conformance.LOSS_TYPES)} loss types and
            {len(conformance.IMPORTANCE_SAMPLING_LEVELS)} levels every two values of two options are
            together in a case: {counts["trl_loss"]} cases for TRL's loss, {counts["fused_loss"]}
            for ours. That is not the full product of the options, which has {product:,} cases or
            more for each; `pytest -m slow` adds {DRAWS} seeded draws from it for either."""),
        paragraph(f"""
            **Runs** (`tests/integrations/test_trl_runs.py`): whole seeded `train()` runs. Every
            number in every log row and every final weight is the same to {TOLERANCE:g}, with
            `group_rows=False`, because the order of rows is TRL's then."""),
        "## Options",
        table(["option", "values in the pairs", *paths, "compared by"], option_rows()),
        "What is in the batch, all of it in the pairs:",
        table(["", "values", *paths], batch_rows()),
        paragraph("""
            From vLLM vespo takes weights of tokens alone: TRL refuses its `sequence_*` modes there,
            so they are not in its pairs. vLLM itself is not run, its log-probs are made by hand.
            """),
        "## Runs",
        table(["", "run", "options", *paths], run_rows()),
        paragraph(f"""
            The last one is also resumed from its own checkpoint and from TRL's, and its logged
            completions are the same. `FusedRLOOTrainer` against `RLOOTrainer`: {rloo}."""),
        "## The native trainer",
        paragraph("""
            `fusedgrpo.GRPOTrainer` has a loop of its own. Its update of a step, whole and cut into
            micro-batches, against one call of stock `_compute_loss` on the same rows: the loss and
            the gradient are the same to 1e-05, and so is what the entropy controller makes of it
            (`tests/integrations/test_trl_native_loss.py`). transformers makes its schedules, and
            the optimizers that are not AdamW; the steps at which it logs, evaluates and saves are
            compared with transformers' (`tests/engine/test_run_control.py`). Other than there, a
            quantile of entropies is of all tokens of a step, and `sync_ref_model` works with an
            adapter as well."""),
        table(["case", "options"], ([name, listed(options)] for name, options in NATIVE.items())),
        paragraph(f"""
            **TRL's own tests**, {COUNTED}: `tests/test_grpo_trainer.py` of TRL's repository as it
            was on 2026-07-24, without the classes for vision models and slow tests, offline, on the
            CPU, with tiny random models in place of those on the Hub and 0.35 epochs in place of 3.
            Stock TRL {TESTED} passes {STOCK_PASSES} of them where jmespath is not installed. Of
            these the native trainer passes, by what is changed in the script:"""),
        table(["changed", "passed"], ([what, n] for what, n in PASSED.items())),
        paragraph("""
            They differ by what trains: LoRA unless all weights are asked for, or `args` are TRL's
            own (`docs/decisions/0003-lora-unless-asked.md`), and 47 of these tests ask whether
            every weight of the model has changed, one for the model's own class and one for its
            copy as reference. Not passed in the first row:"""),
        bullets(f"{cause}: {n}." for cause, n in NOT_PASSED.items()),
        paragraph(f"""
            With jmespath {ACT_PASSES + sum(ACT_NOT_PASSED.values())} more run, of tools and
            environments, and stock TRL passes all of them ({ACTED}). What the policy says in them
            is put in the place of `model.generate`, which our decoder does not call: with
            `finetuning_type="full"` and a `sampler` that asks `model.generate` the native trainer
            passes {ACT_PASSES}. Not passed:"""),
        bullets(f"{cause}: {n}." for cause, n in ACT_NOT_PASSED.items()),
        paragraph(SIDE_BY_SIDE),
        paragraph(SCRIPTS),
        "## Not compared",
        bullets(f"`{name}`: {why}." for name, why in NOT_COMPARED.items()),
        "## Untouched",
        paragraph("""
            Options that only TRL's own code reads, the same code with and without us (but for
            rollouts of ours, see below):"""),
        bullets(
            f"{kind}: {', '.join(f'`{name}`' for name in names)}"
            for kind, names in UNTOUCHED.items()
        ),
        "## Rollouts",
        paragraph(f"""
            The comparisons above are of completions that TRL generates. With `fused_rollouts=True`
            our decoder draws them, with other noise, so that runs are not the same number by
            number; log rows have the same names
            (`tests/integrations/test_trl_rollouts.py`). It obeys `max_completion_length`,
            `num_generations_eval`, {code(ROLLOUT_OPTIONS)}, and of `generation_kwargs`
            {code(trl_rollouts.KNOWN)}. Refused when the trainer is made:
            {code(trl_rollouts.REFUSED)}, every other key of `generation_kwargs`, a multimodal
            `processing_class`, weights in shards, a model or adapter that takes TRL's own forward
            pass or cannot be forwarded packed, and what transformers would add from the model's own
            `generation_config`: {code(trl_rollouts.OF_THE_MODEL)}."""),
    ]) + "\n"  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(document())
