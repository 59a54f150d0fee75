from __future__ import annotations

import dataclasses

import pytest

from fusedgrpo.config.aliases import ALIASES
from fusedgrpo.config.foreign import REFUSED
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError

OPTIONS = {spec.name for spec in dataclasses.fields(GRPOConfig())}

# Where our default is not TRL's, and why.
DIFFERENT = {
    "output_dir": "TRL's null becomes this name",
    "do_train": "nothing else can be done",
    "dtype": "TRL loads float32, which doubles the memory of a bfloat16 model",
    "model_revision": "null and main are the same revision",
    "project": "null is the tracker's environment variable, or fusedgrpo",
    "learning_rate": "null is 3e-5 for an adapter and TRL's 1e-6 for all weights",
    "lora_alpha": "null is 2 * lora_r: TRL's 32 at its rank of 16",
    "lora_dropout": "dropout between sampling and scoring makes the ratio wrong",
    "disable_dropout": "dropout in the update alone makes ratio and KL wrong from step 1 on",
    "lora_target_modules": "all linear layers instead of the query and value projections",
    "use_bnb_nested_quant": "0.4 bits per weight less at the same speed",
}


@pytest.mark.parametrize(
    ("given", "option", "value"),
    [
        ({"pref_beta": 0.04}, "beta", 0.04),
        ({"lora_rank": 64}, "lora_r", 64),
        ({"cutoff_len": 4096}, "max_length", 4096),
        ({"max_new_tokens": 64}, "max_completion_length", 64),
        ({"quantization_bit": 4}, "load_in_4bit", True),
        ({"quantization_bit": None}, "load_in_4bit", False),
        ({"quantization_type": "fp4"}, "bnb_4bit_quant_type", "fp4"),
        ({"double_quantization": False}, "use_bnb_nested_quant", False),
        ({"flash_attn": "fa2"}, "attn_implementation", "flash_attention_2"),
        ({"flash_attn": "auto"}, "attn_implementation", None),
        ({"enable_thinking": False}, "chat_template_kwargs", {"enable_thinking": False}),
        ({"disable_gradient_checkpointing": True}, "gradient_checkpointing", False),
        ({"disable_shuffling": "true"}, "shuffle_dataset", False),
        ({"default_system": "Be brief."}, "system_prompt", "Be brief."),
        ({"use_peft": True}, "finetuning_type", "lora"),
        ({"use_peft": False}, "finetuning_type", "full"),
        ({"dataset_name": "a/b"}, "dataset", "a/b"),
        ({"warmup_ratio": 0.1}, "warmup_steps", 0.1),
        ({"evaluation_strategy": "steps"}, "eval_strategy", "steps"),
        ({"dynamic_sample": True}, "dynamic_sampling", True),
        (
            {"dynamic_sample": True, "max_resample_times": 3},
            "max_sampling_rounds",
            GRPOConfig().max_sampling_rounds,  # the same default
        ),
    ],
)
def test_other_names_are_read(given: dict[str, object], option: str, value: object) -> None:
    assert getattr(GRPOConfig(**given), option) == value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantization_bit": 8}, "quantization_bit: only 4 bits"),
        ({"flash_attn": "fa9"}, "flash_attn: expected one of auto"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: expected a share"),
        ({"use_peft": 1}, "use_peft: expected true or false, got 1"),
        ({"max_resample_times": 0}, "max_resample_times: expected a whole number >= 1, got 0"),
        ({"lora_rank": 0}, "lora_rank: expected an integer >= 1, got 0"),
    ],
)
def test_wrong_values_are_named_as_they_were_given(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GRPOConfig(**given)


def test_aliases_lead_to_options_and_hide_none() -> None:
    assert {alias.option for alias in ALIASES.values()} <= OPTIONS
    assert not ALIASES.keys() & OPTIONS
    assert not REFUSED.keys() & (OPTIONS | ALIASES.keys())


@pytest.mark.peer
@pytest.mark.parametrize("name", ["GRPOConfig", "ModelConfig", "ScriptArguments"])
def test_every_trl_option_is_supported_with_its_default_or_refused_by_name(name: str) -> None:
    trl = pytest.importorskip("trl")
    ours = {spec.name: spec.default for spec in dataclasses.fields(GRPOConfig())}
    unknown, differ, loud = [], [], []
    for spec in dataclasses.fields(getattr(trl, name)):
        factory = spec.default_factory
        default = spec.default if factory is dataclasses.MISSING else factory()
        default = getattr(default, "value", default)
        if spec.name in ours:
            if ours[spec.name] != default and spec.name not in DIFFERENT:
                differ.append((spec.name, ours[spec.name], default))
        elif spec.name in REFUSED:
            if not REFUSED[spec.name].accepts(default):
                loud.append((spec.name, default))
        elif spec.name not in ALIASES:
            unknown.append(spec.name)
    assert (unknown, differ, loud) == ([], [], [])


@pytest.mark.peer
def test_the_listed_differences_are_differences() -> None:
    trl = pytest.importorskip("trl")
    theirs = {
        spec.name: getattr(spec.default, "value", spec.default)
        for peer in (trl.GRPOConfig, trl.ModelConfig)
        for spec in dataclasses.fields(peer)
    }
    ours = {spec.name: spec.default for spec in dataclasses.fields(GRPOConfig())}
    assert all(ours[name] != theirs[name] for name in DIFFERENT)
