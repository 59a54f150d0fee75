"""Arguments of from_pretrained: an option here, handed on, or refused by name."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch
from transformers import BitsAndBytesConfig, Mxfp4Config

from fusedgrpo import GRPOConfig
from fusedgrpo.errors import ConfigError
from fusedgrpo.models.loading import load_model
from fusedgrpo.models.settings import model_settings
from fusedgrpo.models.tokenizer import load_tokenizer


def config(**options):
    return GRPOConfig(use_cpu=True, bf16=False, **options)


def with_arguments(**arguments):
    return config(model_init_kwargs=arguments)


@pytest.mark.parametrize(
    ("argument", "value", "option", "read"),
    [
        ("dtype", "float32", "dtype", "float32"),
        ("torch_dtype", torch.bfloat16, "dtype", "bfloat16"),
        ("attn_implementation", "eager", "attn_implementation", "eager"),
        ("revision", "v2", "model_revision", "v2"),
        ("trust_remote_code", True, "trust_remote_code", True),
        ("gguf_file", "a.gguf", "gguf_file", "a.gguf"),
        ("load_in_4bit", True, "load_in_4bit", True),
    ],
)
def test_an_argument_that_is_an_option_becomes_it(argument, value, option, read):
    others = {"model_name_or_path": "m"}
    made = config(model_init_kwargs={argument: value}, **others)
    assert getattr(made, option) == read and made.model_init_kwargs is None
    assert getattr(config(model_init_kwargs={argument: None}, **others), option) != read


def test_an_option_given_twice_must_be_the_same():
    config(dtype="float32", model_init_kwargs={"torch_dtype": torch.float32})
    with pytest.raises(ConfigError, match=r"dtype and model_init_kwargs.torch_dtype are one opt"):
        config(dtype="float32", model_init_kwargs={"torch_dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"model_init_kwargs.dtype: expected one of auto"):
        with_arguments(dtype="float8")


def test_a_quantization_config_is_four_bits_or_stored_ones():
    made = with_arguments(
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    )
    assert (made.load_in_4bit, made.bnb_4bit_quant_type) == (True, "nf4")
    assert made.use_bnb_nested_quant is False  # the default there
    nested = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    assert with_arguments(quantization_config=nested).use_bnb_nested_quant is True
    stored = Mxfp4Config(dequantize=True)
    assert with_arguments(quantization_config=stored).model_init_kwargs == {
        "quantization_config": stored
    }
    assert with_arguments(quantization_config=None).model_init_kwargs is None
    for value in (BitsAndBytesConfig(load_in_8bit=True), {"load_in_8bit": True}, "nf4"):
        with pytest.raises(ConfigError, match=r"quantization_config: not supported: .*load_in_4b"):
            with_arguments(quantization_config=value)
    skipping = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}
    with pytest.raises(ConfigError, match=r"llm_int8_skip_modules=\['lm_head'\] is not supported"):
        with_arguments(quantization_config=skipping)
    with pytest.raises(ConfigError, match=r"bf16 and .*bnb_4bit_compute_dtype are one option"):
        with_arguments(
            quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
        )


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"device_map": "auto"}, "use_cpu"),
        ({"device_map": {"lm_head": 0, "model": 1}}, "on the device of its process"),
        ({"max_memory": {0: "10GiB"}}, "load_in_4bit"),
        ({"low_cpu_mem_usage": False}, "always loaded that way"),
        ({"load_in_8bit": True}, "load_in_4bit: true"),
        ({"ignore_mismatched_sizes": True}, "would be random"),
        ({"state_dict": {}}, "load the model yourself"),
    ],
)
def test_what_is_decided_here_is_refused_with_a_remedy(arguments, remedy):
    name = next(iter(arguments))
    with pytest.raises(ConfigError, match=rf"model_init_kwargs.{name}: not supported: .*{remedy}"):
        with_arguments(**arguments)


def test_what_asks_for_what_happens_anyway_is_taken():
    made = with_arguments(
        device_map=None, low_cpu_mem_usage=True, use_cache=False, load_in_8bit=False
    )
    assert made.model_init_kwargs is None


def test_the_rest_goes_to_transformers(tmp_path):
    tiny.save(tmp_path / "model")
    made = config(
        model_name_or_path=str(tmp_path / "model"),
        model_init_kwargs={
            "local_files_only": True, "attention_dropout": 0.25, "device_map": {"": "cpu"},
        },
    )  # fmt: skip
    assert model_settings(made).attention_dropout == 0.25
    assert load_model(made, torch.device("cpu")).config.attention_dropout == 0.25
    assert load_tokenizer(made).eos_token_id == tiny.EOS


def test_another_device_or_an_unknown_argument_is_refused(tmp_path):
    tiny.save(tmp_path / "model")

    def made(**arguments):
        return config(model_name_or_path=str(tmp_path / "model"), model_init_kwargs=arguments)

    for where in ({"": 0}, {"": "cuda:1"}, {"": "nowhere"}):
        with pytest.raises(ConfigError, match=r"model_init_kwargs.device_map: "):
            load_model(made(device_map=where), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"model_init_kwargs.atention_dropout: neither .*Did you"):
        model_settings(made(atention_dropout=0.1))
    with pytest.raises(ConfigError, match=r"model_init_kwargs.nosuch: neither"):
        load_model(made(nosuch=1), torch.device("cpu"))


def test_what_is_about_loading_has_no_part_in_a_model_that_is_given(tmp_path, caplog):
    from fusedgrpo.models.policy import Policy

    caplog.set_level(logging.WARNING)
    Policy.load(config(load_in_4bit=True, attn_implementation="eager"), tiny.model())
    assert "not its name: attn_implementation, load_in_4bit have no part in it" in caplog.text
