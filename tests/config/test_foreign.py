from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fusedgrpo.config import foreign, reading
from fusedgrpo.config.foreign import REFUSED, read_options
from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("use_vllm", True, "sampled in this process"),
        ("neftune_noise_alpha", 5.0, "not part of the loss"),
        ("reward_model", "org/rm", "reward_funcs"),
        ("load_in_8bit", True, "load_in_4bit"),
        ("deepspeed", "ds.json", "accelerate launch"),
        ("plot_loss", False, "plots are always written"),
        ("tool_format", "qwen", "chat template"),
        ("create_new_adapter", True, "is trained further"),
        ("filter_groups", {"enable": True, "metric": "acc"}, "dynamic_sampling: true"),
        ("pissa_init", True, "starting from zero"),
    ],
)
def test_options_of_other_trainers_are_refused_by_name(
    key: str, value: object, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: not supported: .*{remedy}"):
        GRPOConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_vllm", False),
        ("use_transformers_continuous_batching", True),
        ("deepspeed", None),
        ("plot_loss", True),
        ("overwrite_cache", True),
        ("save_on_each_node", False),
        ("dataloader_drop_last", False),
        ("cast_lm_head_to_fp32", True),
        ("gradient_checkpointing_kwargs", {"use_reentrant": False}),
    ],
)
def test_values_that_ask_for_what_happens_anyway_are_taken(key: str, value: object) -> None:
    assert GRPOConfig(**{key: value}) == GRPOConfig()


def test_inert_options_are_taken_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    reading._say.cache_clear()
    for _ in range(2):
        assert GRPOConfig(dataset_num_proc=16, dataloader_pin_memory=False) == GRPOConfig()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith("dataset_num_proc changes nothing: prompts are")


def test_harmless_values_are_compared_with_their_type() -> None:
    assert not REFUSED["lora_task_type"].accepts(False)
    assert not REFUSED["use_vllm"].accepts(0)


def test_a_script_reads_the_first_harmless_value() -> None:
    config = GRPOConfig()
    assert config.packing is None and config.use_v1_kernels is False
    assert config.include_for_metrics == [] and config.galore_rank is None


def test_an_option_belongs_to_one_group() -> None:
    with pytest.raises(ValueError, match="use_x is named twice"):
        read_options('[a]\nremedy = ""\nunset = ["use_x"]\n[b]\nremedy = ""\nharmless.use_x = 1')


def test_the_list_is_shipped() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (shipped,) = Path(foreign.__file__).parent.glob("*.toml")
    listed = project["tool"]["setuptools"]["package-data"]["fusedgrpo"]
    assert f"config/{shipped.name}" in listed
