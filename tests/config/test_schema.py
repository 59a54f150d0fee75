from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.config.schema import GRPOConfig, free_to_change
from fusedgrpo.errors import ConfigError

RECIPE = """\
### GRPO
model_name_or_path: Qwen/Qwen2.5-7B
stage: grpo
do_train: true
finetuning_type: lora

### GRPO parameters
num_generations: 8
pref_beta: 0.04

### rewards (verifiable, no reward model)
reward_funcs: accuracy,format

### LoRA
lora_rank: 64
lora_target: all

### data
dataset: my_math_data
template: qwen
cutoff_len: 4096

### training
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 5.0e-7
num_train_epochs: 1
bf16: true
output_dir: saves/qwen2.5-7b/lora/grpo
"""


def refusals(**options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        GRPOConfig(**options)
    return caught.value.problems


def changed(config: GRPOConfig) -> dict[str, object]:
    default = GRPOConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if value != default[name]}


def test_options_are_read_without_torch() -> None:
    code = "import fusedgrpo.config.schema, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_llama_factory_recipe_means_what_it_says(tmp_path: Path) -> None:
    (tmp_path / "grpo.yaml").write_text(RECIPE)
    assert changed(GRPOConfig.from_file(tmp_path / "grpo.yaml")) == {
        "model_name_or_path": "Qwen/Qwen2.5-7B",
        "beta": 0.04,
        "reward_funcs": ["accuracy", "format"],
        "lora_r": 64,
        "dataset": "my_math_data",
        "template": "qwen",
        "max_length": 4096,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-7,
        "num_train_epochs": 1.0,
        "bf16": True,
        "output_dir": "saves/qwen2.5-7b/lora/grpo",
    }


def test_trl_script_arguments_mean_what_they_say() -> None:
    config = GRPOConfig(
        output_dir="saves/grpo",
        num_generations=8,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=5e-7,
        bf16=True,
    )
    assert config.learning_rate == 5e-7
    assert config.bf16 is True


def test_every_option_survives_yaml_and_json(tmp_path: Path) -> None:
    config = GRPOConfig(
        reward_funcs=["accuracy", "my.py:score"],
        reward_weights=[1, 0.5],
        reward_kwargs={"accuracy": {"strict": True}},
        lora_target_modules="q_proj,v_proj",
        allow_change=["beta"],
        report_to="tensorboard,wandb",
        resume_from_checkpoint=True,
    )
    for name, dump in (("c.json", json.dumps), ("c.yaml", yaml.safe_dump)):
        (tmp_path / name).write_text(dump(config.to_dict()))
        assert GRPOConfig.from_file(tmp_path / name) == config


def test_every_option_has_help_and_a_default_inside_its_own_range() -> None:
    defaults = {spec.name: spec.default for spec in dataclasses.fields(GRPOConfig())}
    assert GRPOConfig(**defaults) == GRPOConfig()
    assert all(spec.metadata["help"] for spec in dataclasses.fields(GRPOConfig()))


def test_a_resumed_run_may_differ_in_what_changes_no_result() -> None:
    assert free_to_change() == {
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_change"),
        *("logging_steps", "log_completions", "num_completions_to_print", "report_to", "run_name"),
        *("logging_strategy", "logging_first_step"),
        *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
        *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        *(
            "eval_on_start",
            "eval_strategy",
            "eval_steps",
            "eval_dataset",
            "per_device_eval_batch_size",
        ),
        *("num_generations_eval", "reward_timeout", "tool_timeout", "max_nonfinite_steps"),
        *("dataset", "dataset_dir"),  # the prompts themselves are compared
        *("project", "logging_dir", "disable_tqdm", "dataloader_num_workers", "full_determinism"),
        *("accelerator_config", "held_out_check", "drift_check"),
        "trackio_space_id",
        *("rehearsal", "max_in_flight", "activation_offloading", "gpu_memory"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"),
        *("hub_revision", "log_completions_steps"),
    }


def test_all_violations_are_listed_at_once() -> None:
    problems = refusals(
        epsilon=-0.2,
        beta=-1,
        learning_rate=float("nan"),
        temperature=0,
        max_completion_length=0,
        num_generations=1,
        learning_rat=1,
        use_vllm=True,
        fp16=True,
        bf16=True,
    )
    keys = {problem.split()[0].rstrip(":") for problem in problems}
    assert keys == {
        *("epsilon", "beta", "learning_rate", "temperature", "max_completion_length"),
        *("num_generations", "learning_rat", "use_vllm", "bf16"),
    }


def test_unknown_option_names_the_nearest_one() -> None:
    assert refusals(learning_rat=1e-5) == [
        "learning_rat: unknown option. Did you mean 'learning_rate'?"
    ]
    assert "'lora_rank'" in refusals(lora_rnk=8)[0]


def test_from_dict_refuses_keys_that_are_no_text() -> None:
    with pytest.raises(ConfigError, match="1: unknown option"):
        GRPOConfig.from_dict({1: 2})


def test_one_option_under_two_names_must_have_one_value() -> None:
    assert GRPOConfig(beta=0.04, pref_beta="0.04").beta == 0.04
    (problem,) = refusals(beta=0.1, pref_beta=0.04)
    assert problem == "beta and pref_beta are one option, given as 0.1 and 0.04."


def test_overrides_win_over_the_file_in_any_spelling(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("pref_beta: 0.04\nlearning_rate: 1e-5\nuse_vllm: false\n")
    overrides = {
        "beta": "0",
        "lora_rank": "4",
        "bf16": "null",
        "run_name": "007",
        "reward_funcs": "accuracy,format",
        "chat_template_kwargs": '{"enable_thinking": false}',
        "use_vllm": "false",
        "save_strategy": "no",
    }
    config = GRPOConfig.from_file(path, overrides)
    assert changed(config) == {
        "learning_rate": 1e-5,
        "lora_r": 4,
        "run_name": "007",
        "reward_funcs": ["accuracy", "format"],
        "chat_template_kwargs": {"enable_thinking": False},
        "save_strategy": "no",
    }


def test_a_wrong_override_and_a_wrong_line_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("epsilon: -1\n")
    with pytest.raises(ConfigError) as caught:
        GRPOConfig.from_file(path, {"top_p": "2"})
    assert len(caught.value.problems) == 2


def test_a_configuration_can_be_replaced() -> None:
    config = GRPOConfig(reward_funcs="format")
    assert dataclasses.replace(config, beta=0.1).beta == 0.1
    with pytest.raises(ConfigError, match="beta"):
        dataclasses.replace(config, beta=-1)


@pytest.mark.parametrize(
    ("given", "read"),
    [("all", "all-linear"), ("q_proj", ["q_proj"]), (["all-linear"], "all-linear")],
)
def test_lora_targets_have_one_form(given: object, read: object) -> None:
    assert GRPOConfig(lora_target=given).lora_target_modules == read


@pytest.mark.parametrize(("given", "read"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_trls_truth_values(given: object, read: str) -> None:
    assert GRPOConfig(scale_rewards=given).scale_rewards == read


@pytest.mark.parametrize("given", [None, "none", [], ["none"]])
def test_no_tracker_has_one_form(given: object) -> None:
    assert GRPOConfig(report_to=given).report_to == "none"


def test_a_torch_dtype_is_a_dtype() -> None:
    assert GRPOConfig(torch_dtype=torch.bfloat16).dtype == "bfloat16"


def test_reward_functions_are_names_or_callables() -> None:
    config = GRPOConfig(reward_funcs=refusals)
    assert config.reward_funcs == [refusals]
    assert config.to_dict()["reward_funcs"] == [f"{__name__}:refusals"]
    assert "expected names or callables, got 3" in refusals(reward_funcs=["format", 3])[0]
    assert "at least one" in refusals(reward_funcs="")[0]


@pytest.mark.parametrize("value", [None, [], {}, "", [1], ["x"], {"a": 1}, object(), 3, -0.5, True])
def test_whatever_is_given_is_read_or_refused_in_words(value: object) -> None:
    for name in [*GRPOConfig().to_dict(), *ALIASES, *REFUSED]:
        try:
            GRPOConfig(**{name: value})
        except ConfigError as error:
            option = ALIASES[name].option if name in ALIASES else name
            assert name in str(error) or option in str(error)
