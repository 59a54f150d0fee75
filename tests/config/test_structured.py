"""``structured_outputs``, by all its names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import HfArgumentParser

from fusedgrpo.config.schema import GRPOConfig
from fusedgrpo.config.structured import StructuredOutputs
from fusedgrpo.errors import ConfigError


def test_its_names_are_one_option() -> None:
    config = GRPOConfig(structured_outputs={"regex": r"\d+"})
    assert config == GRPOConfig(vllm_structured_outputs_regex=r"\d+")
    assert config == GRPOConfig(generation_kwargs={"structured_outputs": {"regex": r"\d+"}})
    assert config == GRPOConfig(structured_outputs=r'{"regex": "\\d+", "json": null}')
    asked = StructuredOutputs.of(config.structured_outputs)
    assert asked == StructuredOutputs(regex=r"\d+") and asked.kind == "regex"
    assert StructuredOutputs.of(None) is None
    assert GRPOConfig(vllm_structured_outputs_regex=None) == GRPOConfig()
    choice = StructuredOutputs.of(GRPOConfig(structured_outputs={"choice": ["a", "b"]})
                                  .structured_outputs)  # fmt: skip
    assert choice is not None and dataclasses.asdict(choice) == {
        "regex": None, "json": None, "choice": ("a", "b"), "grammar": None
    }  # fmt: skip
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    read = StructuredOutputs.of({"json": schema})
    assert read == StructuredOutputs(json='{"type": "object", "properties": {"b": {}, "a": {}}}'), (
        "in the order of the schema"
    )
    assert GRPOConfig(structured_outputs={"json": read.json}).structured_outputs == {"json": schema}
    assert GRPOConfig(structured_outputs={"json": "a.json"}).structured_outputs["json"] == "a.json"


@pytest.mark.parametrize("text", ["[0-9]", "12", "yes", "{a}", "a: b", "null"])
def test_an_expression_that_is_typed_stays_text(text: str) -> None:
    config = GRPOConfig.from_file(None, {"vllm_structured_outputs_regex": text})
    assert config.structured_outputs == {"regex": text}
    words = ["--vllm_structured_outputs_regex", text]
    (parsed,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(words)
    assert parsed.structured_outputs == {"regex": text}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"regexp": "a"}, r"one of regex, json, choice, grammar, got 'regexp'. Did you mean 'reg"),
        ({"regex": "a", "choice": ["a"]}, "and one alone, got regex, choice"),
        ({}, "and one alone, got none"),
        ({"regex": 3}, "regex: expected text, got 3"),
        ({"grammar": ""}, "grammar: expected text, got ''"),
        ({"regex": "a\0"}, "NUL character"),
        ({"choice": "ab"}, "choice: expected a list of texts, got 'ab'"),
        ({"choice": []}, "choice: expected a list of texts"),
        ({"choice": ["a", ""]}, "choice: expected text, got ''"),
        ({"json": "{a"}, "json: not JSON: "),
        ({"json": [1]}, r"json: expected text, got \[1\]"),
        ("a+", "expected a mapping or null, got 'a\\+'"),
        ({1: "a"}, "expected a mapping or null"),
    ],
)
def test_what_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^structured_outputs: .*{said}"):
        GRPOConfig(structured_outputs=given)
    if isinstance(given, dict):
        with pytest.raises(ConfigError, match=r"^generation_kwargs\.structured_outputs: "):
            GRPOConfig(generation_kwargs={"structured_outputs": given})


def test_two_that_differ_are_refused_and_a_schema_is_no_secret() -> None:
    with pytest.raises(ConfigError, match="are one option"):
        GRPOConfig(structured_outputs={"regex": "a"}, vllm_structured_outputs_regex="b")
    schema = {"properties": {"password": {"type": "string"}, "api_key": {"const": "abcdef12"}}}
    record = GRPOConfig(structured_outputs={"json": schema}).to_record()
    assert record["structured_outputs"] == {"json": schema}
    assert GRPOConfig.from_dict(record).structured_outputs == {"json": schema}
